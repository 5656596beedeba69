"""Reward functions as TRL calls them; columns of the prompts come by name."""


def right(prompts, completions, answer, **rest):
    return [float(text == wanted) for text, wanted in zip(completions, answer, strict=True)]


def first_line(prompts, completions, answer, **rest):
    return [float(text.strip().split("\n")[0] == wanted) for text, wanted in zip(completions, answer, strict=True)]
