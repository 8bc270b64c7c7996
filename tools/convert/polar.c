#include "tools/convert/polar.h"

#include <math.h>
#include <string.h>

#define SWEEPS_MAX 60

/* Matrices are held by columns here: column j is n values from j * n on. */

static double dot(const double *x, const double *y, uint32_t n)
{
    double sum = 0;
    for (uint32_t i = 0; i < n; i++) {
        sum += x[i] * y[i];
    }
    return sum;
}

static void rotate(double *x, double *y, uint32_t n, double c, double s)
{
    for (uint32_t i = 0; i < n; i++) {
        double a = x[i], b = y[i];
        x[i] = c * a - s * b;
        y[i] = s * a + c * b;
    }
}

/* Makes columns of b orthogonal by rotations, which v collects: b = a v at every time. */
static void orthogonalise(double *b, double *v, uint32_t n)
{
    for (int sweep = 0, turned = 1; turned && sweep < SWEEPS_MAX; sweep++) {
        turned = 0;
        for (uint32_t p = 0; p + 1 < n; p++) {
            for (uint32_t q = p + 1; q < n; q++) {
                double *x = b + p * n, *y = b + q * n;
                double xx = dot(x, x, n), yy = dot(y, y, n), xy = dot(x, y, n);
                if (fabs(xy) <= 1e-15 * sqrt(xx * yy) || xy == 0) {
                    continue;
                }
                double zeta = (yy - xx) / (2 * xy);
                double t = (zeta >= 0 ? 1 : -1) / (fabs(zeta) + sqrt(1 + zeta * zeta));
                double c = 1 / sqrt(1 + t * t);
                rotate(x, y, n, c, c * t);
                rotate(v + p * n, v + q * n, n, c, c * t);
                turned = 1;
            }
        }
    }
}

/* Gives column j of u, which stands for a singular value of zero, a direction that no other has. */
static void complete(double *u, uint32_t n, uint32_t j, const uint8_t *done)
{
    double *x = u + j * n;
    for (uint32_t axis = 0; axis < n; axis++) {
        memset(x, 0, n * sizeof(*x));
        x[axis] = 1;
        for (int twice = 0; twice < 2; twice++) {
            for (uint32_t k = 0; k < n; k++) {
                double along = done[k] ? dot(u + k * n, x, n) : 0;
                for (uint32_t i = 0; i < n; i++) {
                    x[i] -= along * u[k * n + i];
                }
            }
        }
        double length = sqrt(dot(x, x, n));
        if (length > 0.5 / sqrt(n)) { /* there is always such an axis */
            for (uint32_t i = 0; i < n; i++) {
                x[i] /= length;
            }
            return;
        }
    }
}

double polar_rotation(const double *a, uint32_t n, double *room, double *ret)
{
    double *u = room, *v = room + (size_t)n * n;
    uint8_t *done = (uint8_t *)(v + (size_t)n * n);
    double trace = 0, largest = 0;
    memset(v, 0, (size_t)n * n * sizeof(*v));
    memset(done, 0, n);
    for (uint32_t j = 0; j < n; j++) {
        v[j * n + j] = 1;
        for (uint32_t i = 0; i < n; i++) {
            u[j * n + i] = a[i * n + j];
        }
    }
    orthogonalise(u, v, n);
    for (uint32_t j = 0; j < n; j++) {
        double length = sqrt(dot(u + j * n, u + j * n, n));
        largest = length > largest ? length : largest;
    }
    for (uint32_t j = 0; j < n; j++) {
        double length = sqrt(dot(u + j * n, u + j * n, n));
        if (length > 1e-12 * largest) {
            trace += length;
            done[j] = 1;
            for (uint32_t i = 0; i < n; i++) {
                u[j * n + i] /= length;
            }
        }
    }
    for (uint32_t j = 0; j < n; j++) {
        if (!done[j]) {
            complete(u, n, j, done);
            done[j] = 1;
        }
    }
    for (uint32_t i = 0; i < n; i++) {
        for (uint32_t j = 0; j < n; j++) {
            double sum = 0;
            for (uint32_t k = 0; k < n; k++) {
                sum += u[k * n + i] * v[k * n + j];
            }
            ret[i * n + j] = sum;
        }
    }
    return trace;
}
