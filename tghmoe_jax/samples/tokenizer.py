"""Text to ids and back, for any byte-fallback BPE in the `tokenizer.json` format (the embedded one, Phi-3's, Llama's).

Only the `tokenizers` library is imported: worker processes stay light.
"""

from collections.abc import Iterable

import tokenizers
from etils import epath

from tghmoe_jax import untrusted
from tghmoe_jax.errors import UserError
from tghmoe_jax.samples.chat import ChatTemplate

FILES = ("tokenizer.json", "tokenizer_config.json")
MOST_BYTES = 1 << 28  # of a tokenizer.json; Gemma 3's has 33 MB


class Tokenizer:
    """The tokeniser of a base model with its family's template and the ids that the template and generation need.

    Text is data: `encode` spells out anything in it that looks like a special token. Only `encode_template` knows them.
    """

    def __init__(self, tokenizer_json: str, config: dict, chat: ChatTemplate, source: str = "tokenizer.json"):
        try:
            self._template = tokenizers.Tokenizer.from_str(tokenizer_json)
            self._plain = tokenizers.Tokenizer.from_str(tokenizer_json)
        except Exception as error:  # the library raises bare Exception for a malformed file
            raise UserError(
                f"{source} is not a readable tokenizer.json ({error}); copy the base model's file again."
            ) from error
        self._plain.encode_special_tokens = True
        self._source, self.chat = source, chat
        self.vocab_size: int = self._template.get_vocab_size(with_added_tokens=True)
        bos = _name(config.get("bos_token")) or chat.bos
        self.bos_id: int | None = self.id_of(bos) if bos else None
        self.eos_id = self.id_of(_name(config.get("eos_token")) or chat.eos)
        self.pad_id = self.id_of(_name(config.get("pad_token")) or chat.eos)
        special = {token: self.id_of(token) for token in chat.special}
        self.stop_ids = frozenset([self.eos_id, *(special[token] for token in chat.stop)])

    def id_of(self, token: str) -> int:
        """The id of a token. UserError names the file that lacks it."""
        number = self._template.token_to_id(token)
        if number is None:
            raise UserError(f"{self._source} has no token {token}; use the tokeniser files of the same base model.")
        return number

    @classmethod
    def from_folder(cls, path: epath.PathLike, chat: ChatTemplate) -> "Tokenizer":
        """The tokeniser files in a folder (`bases.base.tokenizer_of` finds the template).

        UserError names a missing or broken file.
        """
        folder = epath.Path(path)
        for name in FILES:
            if not (folder / name).is_file():
                raise UserError(
                    f"{folder / name} is missing; copy {' and '.join(FILES)} of the base model into {folder}."
                )
        token = (str, {"content": str}, None)
        named = dict.fromkeys(("bos_token", "eos_token", "pad_token"), token)
        config = untrusted.read_json(folder / FILES[1], named, remedy="copy the base model's file again")
        try:
            text = untrusted.read_bytes(folder / FILES[0], MOST_BYTES).decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{folder / FILES[0]} is not UTF-8 ({error}); copy it again.") from error
        return cls(text, config, chat, str(folder / FILES[0]))

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, without BOS; never a special token's id."""
        return self._ids(self._plain, text)

    def encode_template(self, text: str) -> list[int]:
        """Ids of trusted text, without BOS: special tokens in it are recognised."""
        return self._ids(self._template, text)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids, special tokens left out."""
        return self._template.decode([int(i) for i in ids], skip_special_tokens=True)

    @staticmethod
    def _ids(tokenizer: tokenizers.Tokenizer, text: str) -> list[int]:
        try:
            return tokenizer.encode(text, add_special_tokens=False).ids
        except (UnicodeEncodeError, TypeError) as error:  # half a UTF-16 pair, as from a terminal in another encoding
            raise UserError(f"The text {text!r} is not valid Unicode; give it in UTF-8.") from error


def _name(token: str | dict | None) -> str | None:
    """The token's text: tokenizer_config.json holds it bare or as an object with `content`."""
    return token.get("content") if isinstance(token, dict) else token
