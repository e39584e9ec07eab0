"""The playground in a browser, as tests use it."""

from __future__ import annotations

from typing import Any

END_S = 60


class Page:
    """A tab. complaints: script errors and requests to other hosts. loaded False: the page cannot load the models.
    runs: the page runs the server's example by itself."""

    def __init__(
        self, browser: Any, url: str, pace: str = "0", *, loaded: bool = True, runs: bool = False, **context: Any
    ) -> None:
        self.tab = browser.new_page(**context)
        self.tab.set_default_timeout(END_S * 1000)
        self.complaints: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.tab.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.tab.on("console", lambda m: self.complaints.append(m.text) if m.type == "error" else None)
        self.tab.on("request", lambda r: self._note(r, url))
        self.tab.goto(url if runs else f"{url}#wait")
        if loaded:
            self.wait("#model option")
        self.tab.select_option("#pace", pace)

    def _note(self, request: Any, url: str) -> None:
        if not request.url.startswith(url):
            self.complaints.append(f"fetched {request.url}")
        if request.method == "POST":
            self.bodies.append(request.post_data_json)

    def run(self) -> None:
        self.tab.click("#run")
        self.wait("#run:enabled")

    def wait(self, selector: str) -> None:
        self.tab.wait_for_selector(selector, state="attached")

    def ended(self) -> None:
        """Wait until the replay is at its last pass."""
        self.wait("#play:has-text('Replay'):enabled")

    def go_to(self, number: int) -> None:
        self.tab.locator("#pass").fill(str(number))

    def texts(self, selector: str) -> list[str]:
        return list(self.tab.locator(selector).all_text_contents())

    def tokens(self, panel: int, kind: str = "") -> list[str]:
        return self.texts(f".panel:nth-child({panel}) .canvas .token{kind}")

    def figures(self, panel: int) -> list[float]:
        return [float(text) for text in self.texts(f".panel:nth-child({panel}) dd")]
