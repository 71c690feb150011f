"""A reward that even a random model can earn more of: how many of the characters it wrote are vowels."""

import lightning_rl as lrl


def score(task: "lrl.Task", episode: "lrl.Episode") -> dict[str, float]:
    text = (episode.calls[0].response.get("content") or "") if episode.calls else ""
    return {"vowels": sum(letter in "aeiouAEIOU" for letter in text) / max(len(text), 1)}
