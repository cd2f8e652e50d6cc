"""A Hugging Face chat template in jinja: the tokenizer's own, or a file's.

A template is a program that somebody else may have written: it may fail in any way, or take for ever. So it is
rendered in a process of its own (`sandbox`), where `jinja_writing` makes segments of what it writes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from tune.data.conversation import BadRowError, Conversation
from tune.data.templates import sandbox
from tune.data.templates.jinja_writing import JinjaWriting
from tune.data.templates.segment import Segment

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class JinjaTemplate:
    """A chat template rendered by transformers' own sandboxed jinja.

    `name` is what messages call it; `bound` is the tokenizer whose special tokens it may write.
    """

    name: str
    jinja: str
    bound: PreTrainedTokenizerBase | None = field(default=None, repr=False, compare=False)

    @cached_property
    def writing(self) -> JinjaWriting:
        """All that decides what it writes, in plain values."""
        assert self.bound is not None, "bind() comes first"
        added = self.bound.added_tokens_decoder.values()
        tokens = {t.content for t in added if t.special or (t.content.strip() and t.content in self.jinja)}
        return JinjaWriting(self.name, self.jinja, dict(self.bound.special_tokens_map), tuple(sorted(tokens)))

    @cached_property
    def end_of_turn(self) -> str | None:
        """The control token that ends an answer, found by rendering one."""
        return sandbox.end_of_turn(self.writing)

    def control_tokens(self) -> list[str]:
        """None: which of the strings that it writes ought to be tokens, a template does not say."""
        return []

    def bind(self, tokenizer: PreTrainedTokenizerBase) -> JinjaTemplate:
        """This template with the tokenizer's special tokens."""
        return JinjaTemplate(self.name, self.jinja, tokenizer)

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise DataError when the template cannot be compiled; its special tokens come from the tokenizer.

        A file is tried out besides: whether it renders anything, and marks an answer as generated.
        """
        sandbox.check(self.bind(tokenizer).writing)

    def segments(self, conversation: Conversation, *, generation_prompt: bool = False) -> list[Segment]:
        """The rendered conversation, cut at the special tokens that the template writes.

        Raises:
            BadRowError: the template refuses these messages, leaves out their tools or calls, or a special token
                spelled in a message cannot be told from the template's own.
            DataError: the template's prefixes do not allow to find the answers, or it takes too much time or memory.
        """
        [made] = sandbox.write(self.writing, [conversation], generation_prompt)()
        if isinstance(made, BadRowError):
            raise made
        return made

    def begin(self, conversations: Sequence[Conversation]) -> Callable[[], sandbox.Prompts]:
        """Begin with many conversations at once; what is returned waits for their segments.

        It must have been called before this template, or another one in jinja, is asked for anything else.

        Raises:
            DataError: as `segments`; here, or while waiting.
        """
        return sandbox.write(self.writing, conversations)
