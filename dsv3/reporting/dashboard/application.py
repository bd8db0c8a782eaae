"""The Dash application: what answers the page, and who is answered at all."""

from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from dash import Dash
from flask import Response, request

from dsv3.reporting.dashboard.address import from_search
from dsv3.reporting.dashboard.answers_to_page import add_callbacks
from dsv3.reporting.dashboard.page_layout import page
from dsv3.reporting.dashboard.watched import Watched
from dsv3.reporting.page import CSS

OWN_HOSTS = ("127.0.0.1", "localhost", "::1")


def build_app(root: Path) -> Dash:
    """The Dash application; nothing is fetched from elsewhere."""
    app = Dash(
        __name__,
        title="dsv3",
        update_title="",
        serve_locally=True,
        add_log_handler=False,
        suppress_callback_exceptions=True,  # of callbacks for views that are not shown yet
    )
    app.index_string = app.index_string.replace("{%css%}", f"<style>{CSS}</style>{{%css%}}").replace(
        "{%favicon%}", '<link rel="icon" href="data:,">'
    )
    app.layout = page(root)
    watched = Watched(root)
    add_callbacks(app, watched)
    protect(app)
    read_early(app, watched)
    return app


def read_early(app: Dash, watched: Watched) -> None:
    """Read the tables of a page that is asked for while its browser still loads the scripts. What nobody has asked for
    yet is read when nobody waits."""

    @app.server.before_request
    def begin() -> None:
        watched.ahead.pause()
        if request.path == "/":
            asked = from_search(request.query_string.decode(errors="replace"))
            watched.ahead.begin(partial(watched.read, asked.run))

    @app.server.teardown_request
    def answered(error: BaseException | None) -> None:
        watched.ahead.pause()


def protect(app: Dash) -> None:
    """Answer this machine's own pages alone: a foreign site that has its name resolve to 127.0.0.1 is refused, and so
    is being shown in another page's frame. No script runs but the page's own, whatever a run folder holds."""
    scripts = " ".join(["'self'", *app.csp_hashes()])
    policy = (
        f"default-src 'self'; script-src {scripts}; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
        "font-src 'self' data:; object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )

    @app.server.before_request
    def refuse_other_hosts() -> tuple[str, int] | None:
        host = urlsplit(f"//{request.host}").hostname
        return None if host in OWN_HOSTS else ("This page answers at http://127.0.0.1 and http://localhost only.", 403)

    @app.server.after_request
    def restrict(response: Response) -> Response:
        response.headers["Content-Security-Policy"] = policy
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Referrer-Policy"] = "no-referrer"
        return response
