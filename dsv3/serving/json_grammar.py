"""Texts held to a JSON schema, by llguidance."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ANY_OBJECT = {"type": "object"}
LARGEST = 50_000
"""Characters of a schema."""
LEXER_STATES = 20_000
"""At about 2 kB each: what one text's grammar may use."""


class JSONGrammars:
    """Grammars over the vocabulary of one tokenizer."""

    def __init__(self, tokenizer: Path, *, vocabulary: int, eos: int) -> None:
        """`tokenizer`: a `tokenizer.json`. `vocabulary`: of the model, which may be larger."""
        self.tokenizer, self.vocabulary, self.eos = tokenizer, vocabulary, eos
        self._compiled: Any = None  # when it is first needed

    def grammar(self, schema: dict[str, Any]) -> "JSONGrammar":
        """Raises ValueError where it is no schema that llguidance knows."""
        from llguidance import LLMatcher, LLParserLimits, LLTokenizer

        text = json.dumps(schema)
        if len(text) > LARGEST:
            raise ValueError(f"response_format: the schema has {len(text):,} characters; at most {LARGEST:,} are read")
        if self._compiled is None:
            content = self.tokenizer.read_text(encoding="utf-8")
            self._compiled = LLTokenizer(content, n_vocab=self.vocabulary, eos_token=self.eos)
        # No spaces between the parts of JSON, or a small model would write them to the end.
        rules = LLMatcher.grammar_from_json_schema(text, overrides={"whitespace_flexible": False})
        limits = LLParserLimits(max_lexer_states=LEXER_STATES)
        matcher = LLMatcher(self._compiled, rules, log_level=0, limits=limits)
        if matcher.is_error():
            raise ValueError(f"response_format: {' '.join(matcher.get_error().split())[:300]}")
        return JSONGrammar(matcher, self.vocabulary, self.eos)


class JSONGrammar:
    """Of one text: a `Grammar`."""

    def __init__(self, matcher: Any, vocabulary: int, eos: int) -> None:
        self.matcher, self.vocabulary, self.eos = matcher, vocabulary, eos

    def allowed(self) -> Tensor:
        """bool [V]. Where the text is complete, or its grammar too complex to go on with, only the end of text."""
        bits = b"" if self.matcher.is_error() or self.matcher.is_stopped() else self.matcher.compute_bitmask()
        bytes_N1 = torch.tensor(list(bits), dtype=torch.uint8).unsqueeze(1)
        allowed_V = ((bytes_N1 >> torch.arange(8, dtype=torch.uint8)) & 1).flatten()[: self.vocabulary].bool()
        if self.matcher.is_error() or not allowed_V.any():
            allowed_V = torch.zeros(self.vocabulary, dtype=torch.bool)
            allowed_V[self.eos] = True
        return allowed_V

    def accept(self, token: int) -> None:
        if token != self.eos:
            self.matcher.consume_token(token)
