"""Responses of OpenAI's API: whole ones, chunks of a stream, errors."""

from collections.abc import Sequence
from typing import Any, Protocol

from dsv3.serving.answers_stream import Answer, Answers
from dsv3.serving.recorder import Likelihood
from dsv3.serving.served_model import Prompts

FINISH = {"eos": "stop", "stop": "stop", "length": "length"}


def error(message: str, *, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    message = message[:1000].encode(errors="replace").decode()  # it may repeat what was given
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Format(Protocol):
    """Of one kind of request."""

    whole: str  # the name of a whole response's object
    chunk: str
    prefix: str  # of ids

    def choice(self, answer: Answer, prompts: Prompts) -> dict[str, Any]: ...

    def opening(self, answer: Answer, prompts: Prompts) -> dict[str, Any] | None:
        """A chunk before the first token."""

    def piece(self, answer: Answer, text: str, start: int, prompts: Prompts) -> dict[str, Any]:
        """A chunk of text, whose tokens are those from `start` on."""


class ChatFormat:
    whole, chunk, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl-"

    def choice(self, answer: Answer, prompts: Prompts) -> dict[str, Any]:
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        logprobs = self._logprobs(answer, 0, prompts)
        return {
            "index": answer.index,
            "message": message,
            "logprobs": logprobs,
            "finish_reason": FINISH[answer.end or ""],
        }

    def opening(self, answer: Answer, prompts: Prompts) -> dict[str, Any] | None:
        return _chunk(answer, {"delta": {"role": "assistant", "content": ""}, "logprobs": None})

    def piece(self, answer: Answer, text: str, start: int, prompts: Prompts) -> dict[str, Any]:
        delta = {"content": text} if text or answer.end is None else {}
        return _chunk(answer, {"delta": delta, "logprobs": self._logprobs(answer, start, prompts)})

    def _logprobs(self, answer: Answer, start: int, prompts: Prompts) -> dict[str, Any] | None:
        if answer.recorder.best is None:
            return None

        def entry(token: int, log_prob: float) -> dict[str, Any]:
            written = prompts.token_bytes(token)
            return {"token": written.decode(errors="replace"), "logprob": log_prob, "bytes": list(written)}

        return {
            "content": [
                {**entry(one.token, one.log_prob), "top_logprobs": [entry(*best) for best in one.best]}
                for one in answer.written(start, len(answer.ids))
            ],
            "refusal": None,
        }


class TextFormat:
    whole = chunk = "text_completion"
    prefix = "cmpl-"

    def choice(self, answer: Answer, prompts: Prompts) -> dict[str, Any]:
        logprobs = None
        if answer.recorder.best is not None:
            tokens = [*answer.job.prompt[: len(answer.read)], *answer.ids]
            logprobs = _columns(tokens, [*answer.read, *answer.written(0, len(answer.ids))], 0, prompts)
        text = answer.shown_prompt + answer.text
        return {"index": answer.index, "text": text, "logprobs": logprobs, "finish_reason": FINISH[answer.end or ""]}

    def opening(self, answer: Answer, prompts: Prompts) -> dict[str, Any] | None:
        """The prompt, where it is repeated."""
        return _chunk(answer, {"text": answer.shown_prompt, "logprobs": None}) if answer.shown_prompt else None

    def piece(self, answer: Answer, text: str, start: int, prompts: Prompts) -> dict[str, Any]:
        logprobs = None
        if answer.recorder.best is not None:
            before = len(answer.shown_prompt) + len(answer.text) - len(text)
            likelihoods = answer.written(start, len(answer.ids))
            logprobs = _columns(answer.ids[start:], likelihoods, before, prompts)
        return _chunk(answer, {"text": text, "logprobs": logprobs})


def _chunk(answer: Answer, fields: dict[str, Any]) -> dict[str, Any]:
    return {"index": answer.index, **fields, "finish_reason": FINISH[answer.end] if answer.end else None}


def _columns(
    tokens: Sequence[int], likelihoods: Sequence[Likelihood | None], offset: int, prompts: Prompts
) -> dict[str, Any]:
    """Log-probabilities as lists, one entry a token."""
    texts = [_token_text(token, prompts) for token in tokens]
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(prompts.token_bytes(token).decode(errors="ignore"))
    return {
        "tokens": texts,
        "token_logprobs": [None if one is None else one.log_prob for one in likelihoods],
        "top_logprobs": [None if one is None else _best(one, prompts) for one in likelihoods],
        "text_offset": offsets,
    }


def _best(one: Likelihood, prompts: Prompts) -> dict[str, float]:
    best: dict[str, float] = {}
    for token, log_prob in one.best:
        best.setdefault(_token_text(token, prompts), log_prob)  # of two tokens with one text the likelier
    return best


def _token_text(token: int, prompts: Prompts) -> str:
    """Bytes that are no whole characters as OpenAI writes them."""
    written = prompts.token_bytes(token)
    try:
        return written.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in written)


def usage(answers: Answers) -> dict[str, Any]:
    """Prompts that several texts continue are counted once."""
    prompts = {tuple(answer.job.prompt) for answer in answers.answers}
    rows = [answer.job.row for answer in answers.answers if answer.job.row is not None]
    read, written = sum(map(len, prompts)), sum(len(answer.ids) for answer in answers.answers)
    return {
        "prompt_tokens": read,
        "completion_tokens": written,
        "total_tokens": read + written,
        "prompt_tokens_details": {"cached_tokens": min(read, sum(row.copied for row in rows))},
    }


def timings(answers: Answers, now: float) -> dict[str, Any]:
    """Of the whole request: seconds to the first token, tokens per second, drafts. `now`: by the scheduler's clock."""
    jobs = [answer.job for answer in answers.answers]
    recorders = [answer.recorder for answer in answers.answers]
    asked, first = min(job.asked for job in jobs), [job.first for job in jobs if job.first is not None]
    written = sum(len(answer.ids) for answer in answers.answers)
    return {
        "first_token_seconds": round(min(first) - asked, 4) if first else None,
        "tokens_per_second": round(written / max(now - asked, 1e-6), 2),
        "passes": sum(recorder.passes for recorder in recorders),
        "drafts_made": sum(recorder.drafts_made for recorder in recorders),
        "drafts_kept": sum(recorder.drafts_kept for recorder in recorders),
    }
