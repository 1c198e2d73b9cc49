"""Reports: one self-contained HTML page of pictures, and the tables behind them.

Pure functions from values to text; the commands read and write files. The pictures are drawn in the
browser by Apache ECharts, whose release lies unchanged in ``static/``.
"""

if __name__ != "eplb.cli.report":
    raise ImportError(
        "import eplb.cli.report; the bare name would make a second copy of its classes"
    )
