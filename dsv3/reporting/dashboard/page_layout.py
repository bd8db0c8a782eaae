"""The page around the views: tabs, controls, the table of runs."""

from pathlib import Path
from typing import Any

import dash_ag_grid as dag
from dash import dcc, html

from dsv3.reporting.dashboard.address import VIEWS, Choice
from dsv3.reporting.dashboard.elements import control
from dsv3.reporting.overlay import X_AXES

REFRESH_SECONDS = 2
TITLES = {"health": "Health", "training": "Training", "experts": "Experts", "runs": "Runs", "study": "Study"}

OF_ONE_RUN = "health training experts study"
"""Views that show a run, or its study."""


def page(root: Path) -> html.Div:
    return html.Div(
        [
            dcc.Location(id="address", refresh=False),
            dcc.Interval(id="tick", interval=REFRESH_SECONDS * 1000),
            dcc.Store(id="stamp"),
            dcc.Store(id="followed"),
            dcc.Store(id="pinned", data=[]),
            dcc.Store(id="placed"),
            dcc.Store(id="seen", data={"names": []}),
            dcc.Store(id="moves", data={}),
            dcc.Download(id="file"),
            html.Header([tabs(), *pickers(), theme(root)], className="head"),
            slider(),
            runs_panel(),
            html.Main(id="content"),
            dcc.Graph(id="first", style={"display": "none"}),  # Plotly's script is loaded with the page
            html.Footer("Keys: 1 to 5 choose a view, t the theme. Drag in a plot to zoom, double-click to zoom out."),
        ],
        id="page",
        className="view-health",
    )


def tabs() -> Any:
    """No view is chosen until the address tells which: none is drawn for nothing."""
    names = [{"label": f"{TITLES[view]}", "value": view} for view in VIEWS]
    return dcc.RadioItems(names, None, id="view", inline=True, className="tabs")


def pickers() -> list[Any]:
    return [
        control(
            "Run",
            dcc.Dropdown([], None, id="run", clearable=False, placeholder="no runs"),
            "health training experts study",
        ),
        control("Layer", dcc.Dropdown([], None, id="layer", placeholder="the worst"), "health experts"),
        control("Tokens of", dcc.Dropdown([], None, id="domain", placeholder="all domains"), "health"),
    ]


def theme(root: Path) -> html.Div:
    return html.Div(
        [
            html.Span(f"in {root}", className="label"),
            html.Button("CSV", id="save-view", title="what this view shows, as CSV"),
            html.Button("◐", id="theme", title="dark or light"),
        ],
        className="end",
    )


def slider() -> html.Div:
    moment = dcc.Slider(-1, 0, 1, value=0, id="moment", marks=None, allow_direct_input=False)
    return control("Load in the interval that ends at (tokens)", moment, "experts")


def runs_panel() -> html.Div:
    choice = Choice()
    grid = dag.AgGrid(
        id="grid",
        rowData=[],
        columnDefs=[],
        getRowId="params.data.run",
        defaultColDef={"floatingFilter": True, "sortable": True, "resizable": True, "minWidth": 90},
        columnSize="autoSize",
        # The CSV is of these rows; see `grid_options`.
        eventListeners={"rowDataUpdated": ["setGridProps({virtualRowData: shownRows(params.api)})"]},
        dashGridOptions=grid_options([]),
        style=grid_style(0),
    )
    return html.Div(
        [
            html.Div(
                [
                    html.Button("Pin or unpin selected", id="pin"),
                    html.Button("CSV of the table", id="save-table"),
                    html.Span("Select runs to draw them; pinned runs are always drawn.", className="label"),
                    html.Span(id="reading", className="label", role="status"),
                ],
                className="top",
            ),
            grid,
            html.Div(
                [
                    control(
                        "Figures", dcc.Dropdown(list(choice.metrics), list(choice.metrics), id="metrics", multi=True)
                    ),
                    control("Over", dcc.Dropdown(list(X_AXES), choice.x, id="x", clearable=False)),
                    control("Group by", dcc.Dropdown([], None, id="group", placeholder="each run by itself")),
                    control("Smoothing", dcc.Slider(0, 0.99, 0.01, value=choice.smooth, id="smooth", marks=None)),
                    control("Logarithmic", dcc.Checklist(["x", "y"], [], id="log", inline=True)),
                ],
                className="controls",
            ),
        ],
        className="only only-runs",
    )


def grid_options(pinned: list[Any]) -> dict[str, Any]:
    """Of AG Grid. When rows come, dash-ag-grid would select again what the server knew as selected, and a click made
    since would be lost: that is switched off, since AG Grid itself keeps what is selected by the rows' ids."""
    return {
        "onRowDataUpdated": None,
        "rowSelection": {"mode": "multiRow", "selectAll": "filtered"},
        "suppressFieldDotNotation": True,  # settings have dots in their names
        "pinnedTopRowData": pinned,
        "suppressColumnVirtualisation": True,
        "animateRows": False,
        "selectionColumnDef": {"pinned": "left", "width": 46},
        "rowHeight": ROW,
        "headerHeight": ROW,
        "floatingFiltersHeight": ROW + 4,
    }


ROW = 34
"""Height of a row, in pixels."""
MOST_ROWS = 12
"""Rows that the table shows at once."""


def grid_style(rows: int) -> dict[str, str]:
    return {"height": f"{ROW * (min(rows, MOST_ROWS) + 2) + 30}px"}
