#!/bin/sh
# headers_alone.sh HEADER FOLDER LANGUAGE STANDARD COMPILER...: HEADER, first and alone in a file,
# compiles without a warning and without the project's own definitions.
set -eu
header=$1 folder=$2 language=$3 standard=$4
shift 4
printf '#include <%s>\n' "$header" |
    "$@" -x "$language" "-std=$standard" -Wall -Wextra -Wpedantic -Werror -I "$folder" -fsyntax-only -
