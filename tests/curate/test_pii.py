"""Personal data: what is replaced begins and ends where it should, and every kind is found in
the forms it is written in. Keys are drawn in their published forms, so that no file here holds
one."""

from __future__ import annotations

import random
import string
from collections.abc import Callable

import pytest

from megallm.base import optional
from megallm.base.errors import UsageError
from megallm.curate import access_keys
from megallm.curate.config import PiiConfig
from megallm.curate.document import apply_spans
from megallm.curate.pii import Pii, luhn

WITHOUT_PHONES = ("email", "ip", "iban", "card", "ssn", "secret")


def found_in(text: str, step: Pii) -> list[tuple[str, str]]:
    return [(span.reason, text[span.begin : span.end]) for span in step.find(text)]


@pytest.fixture(scope="module")
def step() -> Pii:
    return Pii(PiiConfig(kinds=WITHOUT_PHONES))


@pytest.fixture(scope="module")
def phones() -> Pii:
    if not optional.available("phonenumbers"):
        pytest.skip("phonenumbers is not installed: pip install 'megallm[data]'")
    return Pii(PiiConfig())


ADDRESSES = ("bob@gmail.com", "a@b.io", "jane.doe+news@sub.mail.co.uk", "x_y-1@a-b.org")
AROUND = (  # A.7: 'bob@gmail.com' took the quote along, ?email=a@b.io&x=1 ate the URL
    "'{}'", '"{}"', "`{}`", "“{}”", "‘{}’", "«{}»", "„{}“", "「{}」", "<{}>", "[{}]", "({})",
    "{{{}}}", "|{}|", "**{}**",
    "_{}_", "*{}*", "~{}~", "[mail](mailto:{})", "[mail](mailto:{}?subject=Hi)",
    "<a href='mailto:{}'>me</a>",
    "https://x.org/?email={}&x=1", "https://x.org/u/{}/edit", "https://x.org/#{}", "email={};",
    "user:{}", "to={},cc",
    "name='x' mail='{}'", "--author={}", "x,{},y", "a;{};b", "%3C{}%3E", "E<lt>{}E<gt>",
    "&lt;{}&gt;", "…{}…", "请联系{}谢谢", "連絡先は{}です",
    "Это {}.", "{}.Then we went", "{}. In the end", "{}!", "{}?", "l'{}", "qu'{}", "-{}-",
    "\u200b{}\u200b", "\t{}\n", "say\\n{}\\n", "a\\t{}", "\\r\\n{}\\r\\n",
)  # fmt: skip
OTHER_SCRIPTS = (
    "jürgen@müller.de", "josé.garcía@correo.es", "почта@пример.рф", "ιάσων@παράδειγμα.ελ",
    "用户@例子.公司",
    "jane@xn--mller-kva.de", "zoe\u0308@mail.org", "o'brien@mail.org", "łukasz@poczta.pl",
)  # fmt: skip
NOBODY = (  # A.7 foo@2x.png and D.28 git@github.com: with others of their kinds
    "foo@2x.png", "icon@3x.webp", "logo@1.5x.zip", "git@github.com:megallm/megallm.git",
    "ssh://git@gitlab.com/a/b.git",
    "hg@bitbucket.org/a", "anonymous@ftp.gnu.org", "svn@code.x.org:trunk", "getty@tty1.service",
    "lodash@4.17.21.tgz",
    "pkg@v1.2.3-rc.beta", "npm i @scope/pkg@1.2.3", "image@sha256.json", "root@localhost",
    "@decorator.name", "a@b",
    "x = A@B.T", "k@2x.jpeg", "someone@example.com", "jane@x..org", "jane.@mail.org",
    "@media print", "user@host.timer",
)  # fmt: skip


@pytest.mark.parametrize("around", AROUND)
def test_an_address_ends_at_what_stands_around_it(step: Pii, around: str) -> None:
    for address in ADDRESSES:
        assert found_in(around.format(address), step) == [("email", address)]


def test_addresses_of_other_scripts_and_names_that_are_no_person(step: Pii) -> None:
    for address in OTHER_SCRIPTS:
        for around in ("{}", "Mail ({}), please", "<{}>"):
            assert found_in(around.format(address), step) == [("email", address)]
    for text in NOBODY:
        assert found_in(f"see {text} there", step) == [], text


def drawn(chance: random.Random) -> dict[str, str]:
    """One key of each kind."""

    def of(size: int, letters: str = string.ascii_letters + string.digits) -> str:
        return "".join(chance.choices(letters, k=size - 1)) + "Q7"[letters == string.digits]

    small = string.ascii_lowercase + string.digits
    some = "".join(chance.choices("0123456789abcdef", k=200))
    return {
        "openai": "sk-" + of(20) + "T3Blbk" + "FJ" + of(20),
        "openai project": "sk-" + "proj-" + of(100),
        "openai service": "sk-" + "svcacct-" + of(120),
        "anthropic": "sk-" + "ant-api03-" + of(93) + "AA",
        "openrouter": "sk-" + "or-v1-" + some[:64], "openai like": "sk-" + of(48),
        "github": "gh" + "p_" + of(36), "github server": "gh" + "s_" + of(36),
        "github fine": "github" + "_pat_" + of(22) + "_" + of(59), "gitlab": "gl" + "pat-" + of(20),
        "gitlab runner": "gl" + "rt-" + of(20), "google": "AI" + "za" + of(35),
        "google client": "GOC" + "SPX-" + of(28),
        "google access": "ya" + "29." + of(100),
        "aws": "AK" + "IA" + of(16, string.ascii_uppercase),
        "aws session": "AS" + "IA" + of(16, string.ascii_uppercase),
        "hugging face": "hf" + "_" + of(34, string.ascii_letters),
        "npm": "np" + "m_" + of(36), "pypi": "py" + "pi-AgE" + of(150),
        "docker": "dckr" + "_pat_" + of(27),
        "stripe": "sk" + "_live_" + of(24), "stripe hook": "wh" + "sec_" + of(32),
        "slack": "xo" + "xb-" + of(50, string.digits),
        "slack app": "xa" + "pp-1-A0123456789-" + of(13, string.digits) + "-" + some[:64],
        "slack hook": "https://hooks.slack" + ".com/services/T" + of(8) + "/B" + of(10) + "/" + of(24),
        "discord hook": "https://discord.com" + "/api/webhooks/" + of(18, string.digits) + "/" + of(68),
        "telegram": of(10, string.digits) + ":A" + "A" + of(33),
        "sendgrid": "S" + "G." + of(22) + "." + of(43),
        "shopify": "shp" + "at_" + some[:32], "square": "sq0" + "csp-" + of(43),
        "digitalocean": "dop" + "_v1_" + some[:64],
        "databricks": "da" + "pi" + some[:32], "vault": "hv" + "s." + of(95),
        "grafana": "gl" + "sa_" + of(32) + "_" + some[:8],
        "linear": "lin" + "_api_" + of(40), "figma": "fi" + "gd_" + of(40),
        "postman": "PM" + "AK-" + some[:24] + "-" + some[:34],
        "new relic": "NR" + "AK-" + of(27, string.ascii_uppercase), "groq": "gs" + "k_" + of(52),
        "replicate": "r8" + "_" + of(37),
        "nvidia": "nv" + "api-" + of(64), "atlassian": "ATA" + "TT3" + of(186),
        "mailgun": "ke" + "y-" + some[:32],
        "token": "ey" + "J" + of(30) + ".ey" + "J" + of(60) + "." + of(43),
        "alibaba": "LT" + "AI" + of(20),
        "age": "AGE-SECRET" + "-KEY-1" + of(58, "QPZRY9X8GF2TVDW0S3JN54KHCE6MUA7L")[:57] + "Q",
        "rubygems": "ruby" + "gems_" + some[:48], "nuget": "oy" + "2" + of(43, small)[:42] + "a",
        "heroku": "HRK" + "U-AA" + of(58), "planetscale": "pscale" + "_tkn_" + of(43),
        "supabase": "sb" + "p_" + some[:40], "pulumi": "pu" + "l-" + some[:40], "doppler": "dp" + ".pt." + of(43),
        "notion": "nt" + "n_" + of(11, string.digits) + of(35), "razorpay": "rzp" + "_live_" + of(14),
        "dynatrace": "dt0" + "c01." + of(24, string.ascii_uppercase) + "." + of(64, string.ascii_uppercase),
        "typeform": "tf" + "p_" + of(59), "meta": "EA" + "AC" + of(120),
        "firebase": of(11, string.digits) + ":APA" + "91b" + of(134), "mapbox": "sk" + ".eyJ" + of(60) + "." + of(22),
        "private": "-----BEGIN RSA " + "PRIVATE KEY-----\n" + of(300) + "\n-----END RSA " + "PRIVATE KEY-----",
    }  # fmt: skip


def test_d28_secrets_of_all_kinds_are_found_whole(step: Pii) -> None:
    """3 of 10 kinds were found; here 61 kinds, 5 of each, in 6 frames. What is left of a key
    must say nothing."""
    chance = random.Random(0)
    frames: tuple[Callable[[str], str], ...] = (
        lambda key: key, lambda key: f'API_KEY="{key}"', lambda key: f"token: {key}\n",
        lambda key: f"export X={key}; ls",
        lambda key: f"`{key}`", lambda key: f"Authorization: Bearer {key}, then",
    )  # fmt: skip
    for _ in range(5):
        for kind, key in drawn(chance).items():
            for frame in frames:
                text = frame(key)
                spans = [span for span in step.find(text) if span.reason == "secret"]
                left = apply_spans(text, spans)
                shown = key.removeprefix("https://")
                assert len(spans) == 1 and not any(shown[at : at + 12] in left for at in range(13, len(shown) - 12)), (
                    kind, text, left,
                )  # fmt: skip


def test_passwords_in_urls_and_values_that_are_set(step: Pii) -> None:
    value = "".join(random.Random(1).choices(string.ascii_letters + string.digits + "/+", k=40))
    for text, secret in (
        ("DATABASE_URL=postgres://app:s3cr3t-9@db.acme.io:5432/x", "s3cr3t-9"),
        ("redis://:hunter22@10.0.0.5:6379", "hunter22"),
        ("git clone https://jane:gr8pass@code.acme.io/a.git", "gr8pass"),
        (f"aws_secret_access_key = {value}", value),
        (f'"secretAccessKey": "{value}"', value),
        (f"AWS_SECRET_ACCESS_KEY='{value}'", value),
        (f"AccountName=a;AccountKey={value * 2}abcdef==;Endpoint", f"{value * 2}abcdef=="),
    ):
        assert found_in(text, step) == [("secret", secret)], text
    for text in (
        "https://user:password@host.org/x", "task-force risk-averse ask-me", "sk-learn is sk-short",
        "a disk-space key-value",
        "https://x.org:8080/@jane", "https://a.org/x:y z@b", "the AKIAN people", "hf_transfer",
        "npm_config_registry",
        "sk-container-heading-with-many-small-words-inside-it", "https://x.org/a eyJ and eyJhbGci",
        "xoxo-xoxo",
    ):  # fmt: skip
        assert found_in(text, step) == [], text


def test_every_mark_is_in_the_form_that_it_stands_for() -> None:
    """A key that the scan does not announce would never be looked for."""
    for key in drawn(random.Random(2)).values():
        assert access_keys.is_marked(key) and list(access_keys.find_keys(key))
    for mark, pivot, _ in access_keys.scan_marks():
        assert mark[pivot].isascii() and not mark[pivot].isdigit()


def with_check_digit(body: str) -> str:
    return body + next(digit for digit in string.digits if luhn(body + digit))


def test_d28_cards_bank_accounts_and_social_security_numbers(step: Pii) -> None:
    sizes = {"62": 16, "6222": 19, "81": 16, "2204": 16, "6759": 16, "4": 16, "34": 15, "3528": 16}
    for prefix, size in sizes.items():
        card = with_check_digit((prefix + "0194857362840193756")[: size - 1])
        groups = " ".join(card[at : at + 4] for at in range(0, size, 4))
        for written in {card, groups, groups.replace(" ", "-"), groups.replace(" ", "\u00a0")}:
            if size != 15 or written == card:
                assert found_in(f"card {written}.", step) == [("card", written)]
    for written in (
        "de89370400440532013000", "De89 3704 0044 0532 0130 00", "gb82 west 1234 5698 7654 32",
        "GB82-WEST-1234-5698-7654-32",
        "fr1420041010050500013m02606", "nl91 abna 0417 1643 00",
        "DE89\u00a03704\u00a00044\u00a00532\u00a00130\u00a000",
    ):  # fmt: skip
        assert found_in(f"to {written} by Monday", step) == [("iban", written)]
    for written in ("123 45 6789", "123-45-6789", "123\u00a045\u00a06789", "123\u201145\u20116789"):
        for around in ("SSN {}.", "SSN: {}", "SSN={}", "ssn ({})", "'{}'", "No. {}, please", "- {}"):
            assert found_in(around.format(written), step) == [("ssn", written)], around
    for text in (
        "10 123 45 6789", "123 45 6789 12", "3.123 45 6789", "000 12 3456", "900 12 3456",
        "123 45-6789", "x123 45 6789",
        "de89370400440532013001", "gb82 west 1234 5698 7654 33", "the 6200 0000 0000 0001 mark",
        "de89ab",
        "commit de12ab34cd56ef7890ab", "1234 45 6789",
    ):  # fmt: skip
        assert found_in(text, step) == [], text


LOCAL = (
    "01 42 68 53 00", "01.42.68.53.00", "06 12 34 56 78", "01-42-68-53-00",  # France
    "03-1234-5678", "090-1234-5678", "(03) 1234-5678", "06-6311-2345", "0120-123-456",  # Japan
    "020 7946 0958", "(020) 7946 0958", "0207 946 0958", "01223 334567", "07400 123456",
    "0161 496 0000",  # United Kingdom
    "030 901820", "(030) 12345678", "089/2180 0000", "0171 1234567", "(02) 9374 4000",
    "02-312-3456", "010 6552 9988",
    "06 6982 1234", "020 123 4567", "098765 43210", "(212) 555-2368", "044 668 18 00",
)  # fmt: skip


def test_d28_local_telephone_numbers(phones: Pii) -> None:
    for written in LOCAL:
        for around in ("{}", "Call {} today.", "Tel: {}", "tel:{}", "phone={}", "({})", "ring {}, please"):
            if around != "({})" or "(" not in written:
                assert found_in(around.format(written), phones) == [("phone", written)], (around, written)
    for text in ("Tel. 0142685300", "phone: 2125552368", "call us at 02079460958", "電話 0312345678"):
        assert [kind for kind, _ in found_in(text, phones)] == ["phone"], text
    for text in (
        "01 02 03 04 05", "0a 04 22 32 10 00 ff", "1f 01 42 68 53 00", "01.02.2003 10",
        "2003-01-02 0312", "0.5 1.25 2.75 3.0",
        "id 0142685300", "0312345678", "at 01:42:68:53:00", "00 11 22 33 44", "ISBN 0-306-40615-2",
        "ISBN 978-0-306-40615-7",
        "0123 456", "007 and 008", "pages 010-020, 030-040", "version 01.42.68.53.00.11",
        "0x0142 6853 00", "000 000 000",
        "maddr=239.255.255.1", "415 23 4567 8", "4 152 345 678", "columns 123 45 6789 12", "41 52 34 56 78",
    ):  # fmt: skip
        assert found_in(text, phones) == [], text
    only = Pii(PiiConfig(kinds=("phone",), phone_regions=()))
    assert found_in("020 7946 0958", only) == [] and found_in("(212) 555-2368", only) != []
    with pytest.raises(UsageError, match="phone_regions is 'XX'"):
        Pii(PiiConfig(kinds=("phone",), phone_regions=("GB", "XX")))


def test_a_list_is_matched_by_words_in_front_of_a_number(step: Pii) -> None:
    """`v` before a dotted number speaks of a version; the end of "Aviv" or of "archive item"
    must not."""
    for before in ("Tel Aviv", "dev", "Kyiv", "the subitem", "a rebuild"):
        assert found_in(f"{before} 81.2.69.142", step) == [("ip", "81.2.69.142")], before
    for before in ("v", "version", "Section", "item", "build #", "kernel_v"):
        assert found_in(f"{before} 81.2.69.142", step) == [], before
