#!/usr/bin/env bash
# ArrayRecord's writer says that all is well while nothing fits any more.
#
# Eight records of 300 kB go to a file that may not grow beyond 1 MB (a limit of the process; a full
# disk does the same). Every write() returns, ok() is True after each, and the file on disk is empty
# meanwhile. Only close() raises, a RuntimeError and no OSError, and leaves a file cut at the limit.
#
# It matters to whoever checks ok() per record, or closes in a `finally` that hides errors: hours of
# preprocessing are reported as written. Close before the file counts, and look for the system's
# words in the RuntimeError to tell a full disk from a damaged file.
#
# Exit 0: the behavior below was seen again. 1: it has changed. Needs python3 with venv, and PyPI.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet array-record==0.8.6
"$folder/venv/bin/python" - "$folder" <<'PROGRAM'
import os
import resource
import signal
import sys
from importlib.metadata import version

from array_record.python.array_record_module import ArrayRecordWriter

LIMIT = 1_000_000
path = os.path.join(sys.argv[1], "records")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the system's answer is then an error of write(2)
resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, LIMIT))
writer = ArrayRecordWriter(path, "group_size:1,uncompressed")
seen = []
for number in range(8):
    writer.write(os.urandom(300_000))
    seen.append((writer.ok(), os.path.getsize(path)))
    print(f"record {number}: ok() {seen[-1][0]}, {seen[-1][1]} bytes on disk")
try:
    writer.close()
    error = None
except Exception as raised:
    error = raised
print(f"close(): {type(error).__name__}: {error}")
print(f"{os.path.getsize(path)} bytes are left; array-record {version('array-record')}")
same = all(ok for ok, _ in seen) and type(error) is RuntimeError and os.path.getsize(path) <= LIMIT
print("as before" if same else "the behavior has changed")
sys.exit(0 if same else 1)
PROGRAM
