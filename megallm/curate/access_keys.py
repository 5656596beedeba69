"""Access keys and passwords that are known by their form, each as its issuer publishes it.

A text is searched only when it holds one of `MARKS`, each after something that is no letter or
digit: the extension looks for them in the same pass as for digits (csrc/index/documents.cpp).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache

# Kind: how it begins (the mark that the scan looks for), and the form of the whole.
_FORMS = (
    # Clouds.
    (("AKIA", "ASIA", "ABIA", "ACCA"), r"(?:AKIA|ASIA|ABIA|ACCA)[A-Z0-9]{16}(?![A-Za-z0-9])"),
    (("AIza",), r"AIza[A-Za-z0-9_-]{35}(?![A-Za-z0-9_-])"),
    (("ya29.",), r"ya29\.[A-Za-z0-9_-]{20,512}"),
    (("GOCSPX-",), r"GOCSPX-[A-Za-z0-9_-]{28}(?![A-Za-z0-9_-])"),
    (("LTAI",), r"LTAI[A-Za-z0-9]{20}(?![A-Za-z0-9])"),
    (("dop_v1_", "doo_v1_", "dor_v1_"), r"do[opr]_v1_[0-9a-f]{64}(?![0-9a-f])"),
    (("dapi",), r"dapi[0-9a-f]{32}(?:-\d)?(?![A-Za-z0-9])"),
    (("hvs.", "hvb."), r"hv[sb]\.[A-Za-z0-9_-]{24,300}"),
    (("FwoGZXIvYXdz", "IQoJb3JpZ2lu"), r"(?:FwoGZXIvYXdz|IQoJb3JpZ2lu)[A-Za-z0-9+/=]{100,2000}"),
    # Code and packages.
    (("ghp_", "gho_", "ghu_", "ghs_", "ghr_"), r"gh[pousr]_[A-Za-z0-9]{36,251}(?![A-Za-z0-9])"),
    (("github_pat_",), r"github_pat_[A-Za-z0-9]{22}_[A-Za-z0-9]{59}(?![A-Za-z0-9_])"),
    (("glpat-", "gldt-", "glrt-", "glcbt-", "glptt-", "glsoat-", "glffct-", "glimt-", "glagent-",
      "gloas-"),
     r"gl(?:pat|dt|rt|cbt|ptt|soat|ffct|imt|agent|oas)-[A-Za-z0-9_-]{20,300}(?:\.[0-9a-z.]{2,20})?"),
    (("npm_",), r"npm_[A-Za-z0-9]{36}(?![A-Za-z0-9])"),
    (("pypi-",), r"pypi-AgE[A-Za-z0-9_-]{50,1000}"),
    (("rubygems_",), r"rubygems_[0-9a-f]{48}(?![0-9a-f])"),
    (("dckr_pat_", "dckr_oat_"), r"dckr_[po]at_[A-Za-z0-9_-]{27,32}(?![A-Za-z0-9_-])"),
    (("ATATT3", "ATCTT3"), r"AT[AC]TT3[A-Za-z0-9_=-]{50,300}"),
    (("oy2",), r"oy2[a-z0-9]{43}(?![A-Za-z0-9])"),
    (("lin_api_",), r"lin_api_[A-Za-z0-9]{40}(?![A-Za-z0-9])"),
    (("figd_",), r"figd_[A-Za-z0-9_-]{38,44}(?![A-Za-z0-9_-])"),
    # Models.
    (("sk-", "sk_"),
     r"sk-(?:proj|svcacct|admin|ant-api\d\d|ant-admin\d\d|ant-oat\d\d|or-v1|lf|None)-[A-Za-z0-9_-]{20,300}"
     r"|sk-[A-Za-z0-9]{20}T3BlbkFJ[A-Za-z0-9]{20}(?![A-Za-z0-9])"
     r"|sk-(?=[a-z]*[0-9A-Z])[A-Za-z0-9]{32,64}(?![A-Za-z0-9])"
     r"|sk_(?:live|test|prod)_[A-Za-z0-9]{10,247}|sk_[0-9a-f]{48}(?![0-9a-f])"),
    (("hf_", "api_org_"), r"(?:hf_|api_org_)[A-Za-z]{34}(?![A-Za-z0-9])"),
    (("gsk_",), r"gsk_[A-Za-z0-9]{52}(?![A-Za-z0-9])"),
    (("r8_",), r"r8_[A-Za-z0-9]{37}(?![A-Za-z0-9])"),
    (("xai-",), r"xai-[A-Za-z0-9]{70,90}(?![A-Za-z0-9])"),
    (("pplx-",), r"pplx-[A-Za-z0-9]{48}(?![A-Za-z0-9])"),
    (("nvapi-",), r"nvapi-[A-Za-z0-9_-]{60,70}(?![A-Za-z0-9_-])"),
    # Money, shops and mail.
    (("rk_live_", "rk_test_", "rk_prod_", "pk_live_", "whsec_"),
     r"(?:[rp]k_(?:live|test|prod)_[A-Za-z0-9]{10,247}|whsec_[A-Za-z0-9+/=]{32,64})"),
    (("shpat_", "shpca_", "shppa_", "shpss_"), r"shp(?:at|ca|pa|ss)_[0-9a-fA-F]{32}(?![0-9a-fA-F])"),
    (("sq0atp-", "sq0csp-", "EAAA"),
     r"(?:sq0(?:atp|csp)-[A-Za-z0-9_-]{22,43}|EAAA[A-Za-z0-9_-]{60}(?![A-Za-z0-9_-]))"),
    (("SG.",), r"SG\.[A-Za-z0-9_-]{22}\.[A-Za-z0-9_-]{43}(?![A-Za-z0-9_-])"),
    (("xkeysib-",), r"xkeysib-[0-9a-f]{64}-[A-Za-z0-9]{16}(?![A-Za-z0-9])"),
    (("key-",), r"key-[0-9a-f]{32}(?![0-9a-f])"),
    # Talk and monitoring.
    (("xoxa-", "xoxb-", "xoxe", "xoxo-", "xoxp-", "xoxr-", "xoxs-", "xapp-"),
     r"(?:xox[aboprs]-[A-Za-z0-9-]{20,255}|xoxe(?:\.xox[bp])?-\d-[A-Za-z0-9]{36,170}"
     r"|xapp-\d-[A-Z0-9]+-\d+-[a-z0-9]{30,})"),
    (("hooks.slack.com/",), r"hooks\.slack\.com/(?:services|workflows|triggers)/[A-Za-z0-9+/]{43,60}"),
    (("discord.com/api/webhooks", "discordapp.com/api/webhooks"),
     r"discord(?:app)?\.com/api/webhooks/\d{17,20}/[A-Za-z0-9_-]{60,70}"),
    ((":AA",), r"(?<=\d{8}):AA[A-Za-z0-9_-]{33}(?![A-Za-z0-9_-])"),
    (("glsa_", "glc_"),
     r"(?:glsa_[A-Za-z0-9]{32}_[0-9A-Fa-f]{8}|glc_[A-Za-z0-9+/]{32,400}={0,2})(?![A-Za-z0-9])"),
    (("NRAK-", "NRII-", "NRJS-"),
     r"NR(?:AK-[A-Z0-9]{27}|II-[A-Za-z0-9_-]{32}|JS-[0-9a-f]{19})(?![A-Za-z0-9])"),
    (("sntrys_", "sntryu_"), r"(?:sntrys_eyJ[A-Za-z0-9+/=_]{80,400}|sntryu_[0-9a-f]{64}(?![0-9a-f]))"),
    (("PMAK-",), r"PMAK-[0-9a-f]{24}-[0-9a-f]{34}(?![0-9a-f])"),
    (("HRKU-",), r"HRKU-AA[A-Za-z0-9_-]{58}(?![A-Za-z0-9_-])"),
    (("pscale_",), r"pscale_(?:tkn|pw|oauth)_[A-Za-z0-9=._-]{32,64}"),
    (("sbp_",), r"sbp_[0-9a-f]{40}(?![0-9a-f])"),
    (("pul-",), r"pul-[0-9a-f]{40}(?![0-9a-f])"),
    (("dp.pt.", "dp.st.", "dp.ct."), r"dp\.[psc]t\.(?:[a-z0-9_-]{2,35}\.)?[A-Za-z0-9]{40,44}(?![A-Za-z0-9])"),
    (("ntn_",), r"ntn_\d{11}[A-Za-z0-9]{35}(?![A-Za-z0-9])"),
    (("FLWSECK",), r"FLWSECK(?:_TEST|_LIVE)?-[0-9a-hA-H]{12,32}(?:-X)?"),
    (("rzp_live_",), r"rzp_live_[A-Za-z0-9]{14}(?![A-Za-z0-9])"),
    (("dt0c01.",), r"dt0c01\.[A-Z0-9]{24}\.[A-Z0-9]{64}(?![A-Z0-9])"),
    (("tfp_",), r"tfp_[A-Za-z0-9._=-]{59}"),
    (("EAAM", "EAAC"), r"EAA[MC][A-Za-z0-9]{100,}"),
    ((":APA91b",), r":APA91b[A-Za-z0-9_-]{134}(?![A-Za-z0-9_-])"),
    # Not of one issuer.
    (("sk.eyJ",), r"sk\.eyJ[A-Za-z0-9_-]{40,}\.[A-Za-z0-9_-]{20,}"),
    (("eyJ",), r"eyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}"),
    (("AGE-SECRET-KEY-1",), r"AGE-SECRET-KEY-1[QPZRY9X8GF2TVDW0S3JN54KHCE6MUA7L]{58}"),
    (("-----BEGIN",),
     r"-----BEGIN (?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----[\s\S]{40,16000}?"
     r"-----END (?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----"),
)  # fmt: skip
_MATCHES = tuple((mark, re.compile(form).match) for marks, form in _FORMS for mark in marks)
# Values without a form of their own, told by the name that is set to them.
_ASSIGNED = re.compile(
    r"(?<![A-Za-z0-9])(?:aws_?secret_?access_?key|aws_?secret_?key|secret_?access_?key)"
    r"[\"']?\s{0,3}(?::|=>?)\s{0,3}[\"']?([A-Za-z0-9/+]{40})(?![A-Za-z0-9/+=])|(?<![A-Za-z0-9])(?:AccountKey|SharedAccessKey)=([A-Za-z0-9+/]{43,86}={1,2})",
    re.IGNORECASE,
)
_URL_PASSWORD = re.compile(r"://[^\s/@:'\"<>{}$]{0,64}:([^\s/@'\"<>{}$]{3,128})@(?=[A-Za-z0-9\[])")
_NO_PASSWORDS = frozenset(("password", "passwd", "pass", "pwd", "secret", "token", "xxx", "xxxx", "xxxxx",
                           "***", "..."))  # fmt: skip
_ASSIGNED_MARKS = ("aws_secret", "AWS_SECRET", "awsSecret", "AwsSecret", "secret_access_key",
                   "SECRET_ACCESS_KEY", "secretAccessKey", "SecretAccessKey", "AccountKey=",
                   "SharedAccessKey=")  # fmt: skip
MARKS = (*dict.fromkeys(mark for marks, _ in _FORMS for mark in marks), *_ASSIGNED_MARKS)
_MARK = re.compile(
    "|".join(
        f"(?<![A-Za-z0-9]){re.escape(mark)}" if mark[0].isalnum() else re.escape(mark)
        for mark in MARKS
    )
)
# Of the characters that the scan may turn on, the rarest in text first.
_RARE = "QZ=_XJzqjKVYUHGWxFLOPD-kvBMCRNSITEAybwpgfmcu"


@cache
def scan_marks() -> tuple[tuple[str, int, bool], ...]:
    """Returns what the extension looks for: each mark, the place in it of the character that text
    has least, and whether no letter or digit may stand before it."""

    def rarity(mark: str, place: int) -> int:
        if mark[place] in _RARE:
            return _RARE.find(mark[place])
        return len(_RARE) + mark[place].isdigit()

    pivots = {mark: min(range(len(mark)), key=lambda at: rarity(mark, at)) for mark in MARKS}
    return tuple((mark, pivot, mark[0].isalnum()) for mark, pivot in pivots.items())


def is_marked(text: str) -> bool:
    """Returns whether a text holds one of the marks."""
    return _MARK.search(text) is not None


def find_keys(text: str) -> Iterator[tuple[int, int]]:
    """Yields access keys and private keys; of `name = value` the value."""
    for mark, matches in _MATCHES:
        at = text.find(mark)
        while at >= 0:
            bounded = at and mark[0].isalnum() and text[at - 1].isascii() and text[at - 1].isalnum()
            match = None if bounded else matches(text, at)
            if match:
                yield match.span()
            at = text.find(mark, match.end() if match else at + 1)
    for match in _ASSIGNED.finditer(text):
        yield match.span(match.lastindex or 0)


def find_passwords(text: str) -> Iterator[tuple[int, int]]:
    """Yields passwords in URLs; the name before one and the host after it stay."""
    if "@" in text:
        for match in _URL_PASSWORD.finditer(text):
            if match[1].lower() not in _NO_PASSWORDS:
                yield match.span(1)
