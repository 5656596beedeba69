"""D.30: what surrounds the text of a page and what a browser does not show are left out, and the
text stays."""

from __future__ import annotations

import pytest

from megallm.base import optional
from megallm.curate.html import text_of_html

if not optional.available("selectolax.lexbor"):
    pytest.skip("selectolax is not installed: pip install 'megallm[data]'", allow_module_level=True)

LEFT_OUT = (
    "<header>GONE</header>", "<footer>GONE</footer>", "<nav>GONE</nav>", "<aside>GONE</aside>",
    "<p hidden>GONE</p>",
    "<div hidden=''><p>GONE</p></div>", "<div style='display:none'>GONE</div>",
    "<p style='color:red; DISPLAY : none !important'>GONE</p>",
    "<span style='visibility:hidden'>GONE</span>", "<textarea>GONE</textarea>",
    "<script>GONE</script>", "<style>GONE</style>",
    "<select><option>GONE</select>", "<button>GONE</button>", "<label>GONE</label>",
    "<noscript>GONE</noscript>",
    "<template>GONE</template>", "<form><p>GONE</p><input value=GONE></form>",
    "<div role=navigation>GONE</div>",
    "<div role='Banner'>GONE</div>", "<div role='contentinfo'>GONE</div>",
    "<div role=complementary>GONE</div>",
    "<dialog open>GONE</dialog>", "<div role=dialog>GONE</div>", "<svg><text>GONE</text></svg>",
    "<iframe>GONE</iframe>",
    "<article><footer>GONE</footer></article>", "<article><aside>GONE</aside></article>",
    "<main><nav>GONE</nav></main>",
    "<div hidden='until-found'>GONE</div>", "<p class='x sr-only'>GONE</p>",
    "<datalist><option>GONE</datalist>",
    "<output>GONE</output>", "<fieldset><label>GONE</label><input></fieldset>",
    "<video>GONE</video>", "<!-- GONE -->",
    "<header><div hidden><p style='display:none'>GONE</p></div></header>", "<object>GONE</object>",
    "<canvas>GONE</canvas>",
    "<header><nav><form><label>GONE</label></form></nav></header><footer><aside>GONE</aside></footer>",
    "<section><header>GONE</header></section>",
    "<span class='visuallyhidden'>GONE</span>", "<h2 class='element-invisible'>GONE</h2>",
)  # fmt: skip
KEPT = (
    "<article><header><h1>STAYS</h1></header></article>",
    "<main><header><h1>STAYS</h1></header></main>",
    "<blockquote>So it goes.<footer>STAYS</footer></blockquote>", "<p style='color:red'>STAYS</p>",
    "<details>STAYS</details>",
    "<p style='display:block'>STAYS</p>", "<pre>STAYS</pre>",
    "<table><tr><td>STAYS</td></tr></table>", "<p data-hidden>STAYS</p>",
    "<p style='background:url(display-none.png)'>STAYS</p>", "<div role=main>STAYS</div>",
    "<div role=article>STAYS</div>",
    "<p class='sr-only-not'>STAYS</p>", "<figure><figcaption>STAYS</figcaption></figure>",
    "<address>STAYS</address>",
    "<div aria-hidden=false>STAYS</div>",
    "<p style='--x: display:none-ish; display:inline'>STAYS</p>",
)  # fmt: skip


@pytest.mark.parametrize("part", LEFT_OUT)
def test_boilerplate_of_a_page(part: str) -> None:
    for page in (
        "<html><body>{}<p>First.</p>{}<p>Last.</p>{}</body></html>",
        "<p>First.</p>{}<div>{}<p>Last.</p></div>{}",
    ):
        assert text_of_html(page.replace("{}", part)).split() == ["First.", "Last."]


@pytest.mark.parametrize("part", KEPT)
def test_text_of_a_page(part: str) -> None:
    assert "STAYS" in text_of_html(f"<html><body><p>First.</p>{part}<p>Last.</p></body></html>")


def test_a_form_around_a_whole_page_is_no_form() -> None:
    prose = "<p>Paragraph says what it has to say, at some length and in whole words.</p>" * 9
    form = f"<form method=post><input type=hidden value=x><label>Search</label>{prose}</form>"
    text = text_of_html(f"<body>{form}</body>")
    assert text.startswith("Paragraph says") and text.count("Paragraph") == 9 and "Search" not in text


def test_deep_and_broken_pages() -> None:
    deep = "<div>" * 5_000 + "<header>GONE</header>STAYS" + "<footer>GONE"
    assert text_of_html(deep) == "STAYS"
    assert text_of_html("<p>STAYS<header>GONE<p>GONE") == "STAYS" and text_of_html("") == ""
    assert text_of_html("<div hidden>" * 300 + "GONE") == ""
    for page in ("<body hidden>", "<body style='visibility:hidden'>", "<html style='display:none'>"):
        assert text_of_html(f"{page}<p>STAYS</p>") == "STAYS"  # until a script has run
