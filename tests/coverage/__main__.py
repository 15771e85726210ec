"""`python -m tests.coverage [name ...]` measures every architecture and writes the table."""

import sys
import warnings

from tests.coverage.architectures import NAMES
from tests.coverage.table import PATH, measure, render


def main(names):
    warnings.simplefilter("ignore")
    rows = []
    for name in names or NAMES:
        rows.append(measure(name))
        print(*rows[-1].cells(), flush=True)
        for line in (*rows[-1].unexplained, *rows[-1].wrong):
            print("   ", line)
    if not names:
        PATH.write_text(render(rows))
    return any(row.unexplained or row.wrong for row in rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
