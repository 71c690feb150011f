"""An agent that solves word problems with a calculator: an ordinary tool-calling loop on the `openai` SDK.

It takes its endpoint, key and model from OPENAI_BASE_URL, OPENAI_API_KEY and OPENAI_MODEL, so it runs as it is against
any OpenAI-compatible server. It is what gets trained, and it knows nothing about that.
"""

import ast
import json
import operator
import os
from fractions import Fraction

from openai import OpenAI

SYSTEM = "Use the calculator once to solve the problem, then answer with the number."
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "calculator",
            "description": "Evaluate arithmetic.",
            "parameters": {
                "type": "object",
                "properties": {"expression": {"type": "string"}},
                "required": ["expression"],
            },
        },
    }
]
MAX_TURNS = 4
MAX_EXPRESSION = 100
MAX_RESULT = 10**12
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def solve(task: dict) -> str:
    """Answer `task["question"]`: call the model, run the tools it asks for, until it answers in words."""
    client = OpenAI()
    model = os.environ.get("OPENAI_MODEL", "gpt-4o-mini")
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": task["question"]}]
    content = ""
    for _ in range(MAX_TURNS):
        completion = client.chat.completions.create(model=model, messages=messages, tools=TOOLS)
        message = completion.choices[0].message
        content = message.content or ""
        if not message.tool_calls:
            break
        messages.append(message.model_dump(exclude_none=True))
        for call in message.tool_calls:
            result = run_tool(call.function.name, call.function.arguments)
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    return content


def run_tool(name: str, arguments: str) -> str:
    """The tool's result as the model reads it; whatever is wrong with the call is said in it."""
    if name != "calculator":
        return f"error: no tool {name!r}"
    try:
        return evaluate(json.loads(arguments)["expression"])
    except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        return f"error: {error}"


def evaluate(expression: str) -> str:
    """The value of integers joined by + - * / and parentheses. Anything else is a ValueError."""
    if not isinstance(expression, str) or len(expression) > MAX_EXPRESSION:
        raise ValueError(f"expression must be text of at most {MAX_EXPRESSION} characters")
    try:
        value = _value(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, RecursionError, MemoryError):
        raise ValueError("not arithmetic") from None
    return str(value.numerator) if value.denominator == 1 else f"{float(value):.6g}"


def _value(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        value = Fraction(node.value)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = -_value(node.operand)
    elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        value = OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    else:
        raise ValueError("only integers, + - * / and parentheses")
    if abs(value) > MAX_RESULT:
        raise ValueError("number too large")
    return value


if __name__ == "__main__":
    print(solve({"question": input("Problem: ")}))
