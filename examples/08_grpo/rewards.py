"""A reward function as TRL calls it; columns of the prompts come by name."""


def right(prompts, completions, answer, **rest):
    return [float(text == wanted) for text, wanted in zip(completions, answer, strict=True)]
