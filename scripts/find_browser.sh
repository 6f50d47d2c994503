#!/bin/sh
# Print the path of a Chromium for the tests of the page; install one where there is none.
set -e
for name in chromium chromium-browser google-chrome google-chrome-stable; do
  if command -v "$name" >/dev/null 2>&1; then command -v "$name"; exit 0; fi
done
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
  apt-get update -qq >&2 && apt-get install -y -qq chromium >/dev/null
  command -v chromium
  exit 0
fi
echo "no Chromium was found: install the package chromium (the tests of the page need it)" >&2
exit 1
