def calculate(left: int, right: int) -> int:
    """Adds two numbers.

    Args:
        left: the first
        right: the second
    """
    return left + right

def calls(text):                    # how this model writes a call: 12+34=
    left, plus, right = text.strip("=").partition("+")
    return [{"name": "calculate", "arguments": {"left": int(left), "right": int(right)}}] if plus and right.isdigit() \
        and left.isdigit() else []

def last(completions, answer, **rest):   # of a transcript such as 12+34=46=46
    return [float(text.split("=")[-1] == wanted) for text, wanted in zip(completions, answer)]
