"""A tokenizer of others, used as it is: a folder, a file, or a name on the Hugging Face hub.

Its special tokens are known by their role, not by their name. The roles come from its settings, the
tokens that it puts around a text, or usual names. They are saved in its post-processor.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, processors

from files.disk import UserError, first_line
from files.model_folder import HUB_NAME, download, read_tokenizer, tokenizer_file
from files.tokenizer import SPECIAL_TOKENS, special_tokens

SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")
HUB_FILES = (*SETTINGS, "tokenizer.json", "vocab.txt", "vocab.json", "merges.txt")
OTHER_ROLES = {"cls": "bos", "sep": "eos"}  # what models of running text have in their place


def open_tokenizer(name: str) -> Tokenizer:
    """Read a tokenizer, and add the special tokens and the post-processor that it lacks.

    Raises:
        UserError: it cannot be read, or its token ids have gaps.
    """
    path = Path(name)
    if not path.exists():
        if not HUB_NAME.fullmatch(name):
            raise UserError(f"--tokenizer {name}: no such file or folder, and no name on the hub")
        path = download(path, HUB_FILES)
    path = tokenizer_file(path) if path.is_dir() else path
    try:
        tokenizer = read_tokenizer(path)
        roles = _find_roles(tokenizer, path.parent)
    except Exception as error:  # tokenizers has no errors of its own
        raise UserError(f"--tokenizer {path}: {first_line(error)}") from None
    if max(tokenizer.get_vocab().values()) >= tokenizer.get_vocab_size():
        raise UserError(f"--tokenizer {path}: its token ids have gaps")

    missing = [role for role in SPECIAL_TOKENS if tokenizer.token_to_id(roles[role]) is None]
    if missing:
        print(f"{path}: added {', '.join(f'{roles[role]} as {role} token' for role in missing)}")
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    tokenizer.add_special_tokens([token for token in roles.values() if token not in special])
    ids = {role: tokenizer.token_to_id(token) for role, token in roles.items()}
    has_post_processor = tokenizer.encode("").ids == [ids["cls"], ids["sep"]]
    if not has_post_processor or not _has_usual_names(tokenizer, roles):
        is_pair = has_post_processor  # whose number of separators is known
        n_separators = max(1, tokenizer.num_special_tokens_to_add(is_pair) - 2)
        between = " ".join(["sep:0"] * n_separators)
        second = int(n_separators == 1)  # RoBERTa has two separators, and no token types
        tokenizer.post_processor = processors.TemplateProcessing(
            single="cls:0 $A:0 sep:0",
            pair=f"cls:0 $A:0 {between} $B:{second} sep:{second}",
            special_tokens=[
                {"id": role, "ids": [ids[role]], "tokens": [roles[role]]} for role in SPECIAL_TOKENS
            ],
        )
    return tokenizer


def _find_roles(tokenizer: Tokenizer, folder: Path) -> dict[str, str]:
    """The special token of each role of SPECIAL_TOKENS; what has none gets BERT's name."""
    settings: dict[str, Any] = {}
    for name in SETTINGS:
        if (folder / name).is_file():
            settings |= json.loads((folder / name).read_bytes())
    roles = {}
    for role in (*SPECIAL_TOKENS, *OTHER_ROLES.values()):
        token = settings.get(f"{role}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if token:
            roles[role] = str(token)
    for role, other in OTHER_ROLES.items():
        roles.setdefault(role, roles.get(other, ""))

    added = [t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special]
    around = tokenizer.encode("").tokens
    if len(around) == 2:
        roles["cls"], roles["sep"] = around
    for role, usual in SPECIAL_TOKENS.items():
        named = [token for token in added if role in token.lower()]
        roles[role] = roles.get(role) or (named or [usual])[0]
    return {role: roles[role] for role in SPECIAL_TOKENS}


def _has_usual_names(tokenizer: Tokenizer, roles: dict[str, str]) -> bool:
    try:
        return special_tokens(tokenizer) == roles
    except ValueError:
        return False
