// An agent in another language: an ordinary tool-calling loop over HTTP, with nothing but what Node brings along.
//
// It reads its task as a line of JSON, finds the model at OPENAI_BASE_URL, and writes its answer as a line of JSON. Try it:
//   lrl run --command "node recipes/agents/calculator.js" --model smollm2-135m --task '{"question": "What is 12 * 7?"}'

const { readFileSync } = require("node:fs");

const SYSTEM = "Use the calculator once to solve the problem, then answer with the number.";
const TOOLS = [
  {
    type: "function",
    function: {
      name: "calculator",
      description: "Evaluate arithmetic.",
      parameters: { type: "object", properties: { expression: { type: "string" } }, required: ["expression"] },
    },
  },
];
const MAX_TURNS = 4;

async function complete(messages) {
  const response = await fetch(`${process.env.OPENAI_BASE_URL}/chat/completions`, {
    method: "POST",
    headers: { "content-type": "application/json", authorization: `Bearer ${process.env.OPENAI_API_KEY}` },
    body: JSON.stringify({ model: process.env.OPENAI_MODEL, messages, tools: TOOLS }),
  });
  if (!response.ok) throw new Error(`status ${response.status}: ${await response.text()}`);
  return (await response.json()).choices[0].message;
}

function calculate(call) {
  try {
    const { expression } = JSON.parse(call.function.arguments);
    if (!/^[\d\s+\-*/().]{1,100}$/.test(expression)) return "error: only numbers, + - * / and parentheses";
    return String(Function(`"use strict"; return (${expression})`)());
  } catch (error) {
    return `error: ${error.message}`;
  }
}

async function solve(task) {
  const messages = [
    { role: "system", content: SYSTEM },
    { role: "user", content: task.question },
  ];
  let answer = "";
  for (let turn = 0; turn < MAX_TURNS; turn++) {
    const message = await complete(messages);
    answer = message.content ?? "";
    if (!message.tool_calls?.length) break;
    messages.push(message);
    for (const call of message.tool_calls) {
      messages.push({ role: "tool", tool_call_id: call.id, content: calculate(call) });
    }
  }
  return answer;
}

solve(JSON.parse(readFileSync(0, "utf8"))).then((answer) => console.log(JSON.stringify({ answer })));
