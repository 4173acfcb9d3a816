"""`offsite web`: a page in a browser of this machine."""

from typing import Annotated

import typer

from offsite.client.commands.options import Coordinator, Format, Kit

app = typer.Typer(add_completion=False)

PATIENCE_S = 3.0  # for a coordinator that is away: the page says so, and asks again


@app.command()
def web(
    coordinator: Coordinator,
    identity: Kit,
    port: Annotated[int, typer.Option(min=0, max=65535, help="On loopback; 0 is any free one.")] = 0,
    browser: Annotated[bool, typer.Option("--browser", help="Open it in the browser of this machine.")] = False,
    format: Format = "text",
) -> None:
    """Show runs, sites, figures and versions in a browser, and submit and cancel runs, as who the kit says."""
    import webbrowser

    from offsite.client.listening import listening
    from offsite.client.session import connect
    from offsite.client.web.server import serve
    from offsite.protos.output import say as tell

    def say(link: str) -> None:
        tell(format, {"link": link}, link, "(holds once, for five minutes; Enter prints another, Ctrl-C ends the page)")
        if browser:
            webbrowser.open(link)

    with connect(coordinator, identity=identity, patience_s=PATIENCE_S) as session, listening(port) as bound:
        session.sites()  # a coordinator that does not answer, or not to this kit, is told of here
        serve(session, bound, say=say)
