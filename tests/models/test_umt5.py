"""The text encoder against an encoder written out under the released names, and its tokenizer and text cleaning."""

import json
import math

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lyra.errors import UserError
from lyra.models.umt5 import (
    UMT5TextEncoder,
    clean_text,
    from_released_umt5,
    from_released_umt5_name,
    load_tokenizer,
    load_umt5,
    read_negative_embedding,
    to_released_umt5_name,
    umt5_config,
)
from lyra.models.weight_files import read_weights

HEADS, LAYERS, BUCKETS = 4, 3, 32
TINY = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": LAYERS, "num_heads": HEADS}


def released_shapes(vocab: int, dim: int, hidden: int, heads: int, layers: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the released file."""
    shapes: dict[str, tuple[int, ...]] = {"token_embedding.weight": (vocab, dim), "norm.weight": (dim,)}
    for i in range(layers):
        shapes |= {f"blocks.{i}.attn.{part}.weight": (dim, dim) for part in "qkvo"}
        shapes |= {
            f"blocks.{i}.norm1.weight": (dim,),
            f"blocks.{i}.norm2.weight": (dim,),
            f"blocks.{i}.pos_embedding.embedding.weight": (BUCKETS, heads),
            f"blocks.{i}.ffn.gate.0.weight": (hidden, dim),
            f"blocks.{i}.ffn.fc1.weight": (hidden, dim),
            f"blocks.{i}.ffn.fc2.weight": (dim, hidden),
        }
    return shapes


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        values = torch.randn(shape, generator=generator)
        if "norm" in name:
            return 1 + 0.3 * values
        return values if "embedding" in name else values * shape[1] ** -0.5

    return {name: draw(name, shape) for name, shape in released_shapes(64, 32, 48, HEADS, LAYERS).items()}


@pytest.fixture(scope="module")
def model(weights):
    return load_umt5(weights, umt5_config(**TINY), torch.float32)


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    """A tokenizer in the released form: SentencePiece pieces with bytes for unknown characters, named as T5's."""
    folder = tmp_path_factory.mktemp("tokenizer")
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<s>", 0.0), ("<unk>", -20.0), ("\u2581", -3.0)]
    pieces += [(word, -2.0) for word in ("\u2581a", "\u2581stone", "\u2581court", "\u2581&", "\u2581moss", ",")]
    pieces += [(letter, -6.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    pieces += [(f"<0x{byte:02X}>", -9.0) for byte in "\u5ead".encode()]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=3, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": "T5Tokenizer"}))
    return folder


@pytest.fixture(scope="module")
def encoder(model, tokenizer_folder) -> UMT5TextEncoder:
    return UMT5TextEncoder(model, load_tokenizer(tokenizer_folder), text_len=24)


def bucket_of(offset: int) -> int:
    """Row of the bias table for a key `offset` positions after the query."""
    half = BUCKETS // 2
    exact = half // 2
    distance = abs(offset)
    if distance >= exact:
        # 1e-6 keeps powers of two, whose logarithms are exact fractions, from falling into the row below.
        far = math.log(distance / exact) / math.log(128 / exact) * (half - exact)
        distance = min(exact + int(far + 1e-6), half - 1)
    return distance + (half if offset > 0 else 0)


def root_mean_square_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def written_out_encoder(weights: dict[str, torch.Tensor], ids: list[int]) -> torch.Tensor:
    """UMT5's encoder for one text without padding, in float64: no scaling of logits, a bias table in every layer."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    x = w["token_embedding.weight"][ids]
    buckets = torch.tensor([[bucket_of(key - query) for key in range(len(ids))] for query in range(len(ids))])
    for i in range(LAYERS):
        h = root_mean_square_norm(x, w[f"blocks.{i}.norm1.weight"])
        q, k, v = (h @ w[f"blocks.{i}.attn.{part}.weight"].T for part in "qkv")
        heads = []
        for head in range(HEADS):
            part = slice(8 * head, 8 * head + 8)
            bias = w[f"blocks.{i}.pos_embedding.embedding.weight"][buckets, head]
            heads.append(torch.softmax(q[:, part] @ k[:, part].T + bias, dim=-1) @ v[:, part])
        x = x + torch.cat(heads, dim=-1) @ w[f"blocks.{i}.attn.o.weight"].T
        h = root_mean_square_norm(x, w[f"blocks.{i}.norm2.weight"])
        gate = gelu_tanh(h @ w[f"blocks.{i}.ffn.gate.0.weight"].T)
        x = x + (gate * (h @ w[f"blocks.{i}.ffn.fc1.weight"].T)) @ w[f"blocks.{i}.ffn.fc2.weight"].T
    return root_mean_square_norm(x, w["norm.weight"])


def test_a_released_file_gives_the_written_out_encoder(weights, tmp_path):
    torch.save(weights, tmp_path / "encoder.pth")
    model = load_umt5(read_weights(tmp_path / "encoder.pth"), umt5_config(**TINY), torch.float32)
    lengths = (200, 37, 1)  # Beyond 128 positions all distances share a row of the bias table.
    ids = torch.randint(64, (3, 200), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(200) < torch.tensor(lengths)[:, None]).long()
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=mask).last_hidden_state
    for row, length in enumerate(lengths):
        expected = written_out_encoder(weights, ids[row, :length].tolist())
        assert (out[row, :length] - expected).abs().max() < 1e-5
        assert expected.abs().max() > 1


def test_the_released_names_and_sizes_fit_without_a_rest():
    shapes = released_shapes(256384, 4096, 10240, 64, 24)
    assert len(shapes) == 242
    with torch.device("meta"):
        released = {name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    model = load_umt5(released, umt5_config(), torch.bfloat16)
    assert sum(parameter.numel() for parameter in model.parameters()) == 5_680_910_336
    assert {to_released_umt5_name(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()} == shapes
    assert {name for old in shapes for name in from_released_umt5_name(old)} == set(model.state_dict())


def test_loading_keeps_the_tensors_and_one_embedding(weights):
    model = load_umt5(weights, umt5_config(**TINY), torch.float32)
    assert model.shared.weight is model.encoder.embed_tokens.weight
    for name, tensor in model.state_dict().items():
        assert tensor.data_ptr() == weights[to_released_umt5_name(name)].data_ptr()
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())


def test_loading_casts_to_the_asked_dtype(weights):
    model = load_umt5(weights, umt5_config(**TINY), torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.shared.weight is model.encoder.embed_tokens.weight


def test_missing_misshapen_and_unknown_weights_are_named(weights):
    config = umt5_config(**TINY)
    without = {name: tensor for name, tensor in weights.items() if name != "blocks.1.attn.k.weight"}
    with pytest.raises(ValueError, match=r"missing encoder\.block\.1\.layer\.0\.SelfAttention\.k\.weight"):
        load_umt5(without, config, torch.float32)
    with pytest.raises(ValueError, match=r"DenseReluDense\.wi_1\.weight is \[47, 32\], not \[48, 32\]"):
        load_umt5({**weights, "blocks.2.ffn.fc1.weight": torch.zeros(47, 32)}, config, torch.float32)
    with pytest.raises(ValueError, match=r"unexpected encoder\.block\.3\.layer\.1\.layer_norm\.weight"):
        load_umt5({**weights, "blocks.3.norm2.weight": torch.ones(32)}, config, torch.float32)
    for name in ("blocks.0.attn.q.bias", "pos_embedding.embedding.weight", "blocks.0.cross_attn.q.weight"):
        with pytest.raises(KeyError, match=name):
            load_umt5({**weights, name: torch.zeros(1)}, config, torch.float32)
    with pytest.raises(KeyError, match="lm_head"):
        to_released_umt5_name("lm_head.weight")


def test_the_inverse_names_give_the_file_back(weights):
    back = {to_released_umt5_name(name): tensor for name, tensor in from_released_umt5(weights).items()}
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in weights)


def test_texts_are_embedded_one_by_one_and_padding_is_zero(encoder, weights):
    texts = ["a stone court , moss", "moss", ""]
    out = encoder(texts)
    assert out.shape == (3, 24, 32) and not out.requires_grad
    for row, text in enumerate(texts):
        ids = encoder.tokenizer(text)["input_ids"]
        assert ids[-1] == 1
        assert (out[row, : len(ids)] - written_out_encoder(weights, ids)).abs().max() < 1e-5
        assert torch.all(out[row, len(ids) :] == 0)


def test_a_long_text_is_cut_before_its_end_token(encoder, weights):
    ids = encoder.tokenizer("moss " * 100)["input_ids"]
    expected = written_out_encoder(weights, [*ids[:23], 1])
    assert (encoder(["moss " * 100])[0] - expected).abs().max() < 1e-5


def test_captions_are_cleaned_before_they_are_tokenised(encoder):
    out = encoder(["  a&amp;nbsp;stone\n\tcourt &amp;amp; moss\u3000", "a stone court & moss"])
    assert torch.equal(out[0], out[1])
    assert out[0, 5].abs().max() > 0  # Five words and the end token.


def test_cleaning_mends_encodings_entities_and_white_space():
    assert clean_text(" a  stone\r\n court\u00a0\u3000, ") == "a stone court ,"
    assert clean_text("&amp;lt;b&amp;gt; &quot;x&quot;") == '<b> "x"'
    # ftfy leaves the entities of a text with a tag alone.
    assert clean_text("<i> &amp;quot;x&amp;quot;") == '<i> "x"'
    assert clean_text("caf\u00c3\u00a9") == "caf\u00e9"
    assert clean_text("\n\t") == ""


def test_the_output_has_the_models_dtype(weights, encoder):
    half = UMT5TextEncoder(load_umt5(weights, umt5_config(**TINY), torch.bfloat16), encoder.tokenizer, text_len=24)
    out = half(["a stone court"])
    assert out.dtype == torch.bfloat16
    assert (out.float() - encoder(["a stone court"])).abs().max() < 0.2


def test_a_tokenizer_is_read_as_its_file_says_whatever_class_is_named(tokenizer_folder):
    tokenizer = load_tokenizer(tokenizer_folder)
    expected = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    for text in ("a stone court", "moss, \u5ead", "a " * 50, ""):
        assert tokenizer(text)["input_ids"] == expected.encode(text).ids
    assert tokenizer.convert_ids_to_tokens(tokenizer("\u5ead")["input_ids"])[-4:-1] == ["<0xE5>", "<0xBA>", "<0xAD>"]
    assert tokenizer.pad_token_id == 0


def test_a_tokenizer_that_is_not_there_is_a_users_mistake(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=r"no tokenizer\.json in"):
            load_tokenizer(folder)


def test_a_damaged_tokenizer_is_a_users_mistake(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model":')
    with pytest.raises(UserError, match="cannot be read"):
        load_tokenizer(tmp_path)
    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="no padding token"):
        load_tokenizer(tmp_path)


def test_the_negative_embedding_is_read_and_checked(tmp_path):
    path = tmp_path / "negative_prompt.pt"
    embedding = torch.randn(1, 24, 32, generator=torch.Generator().manual_seed(2)).bfloat16()
    torch.save({"t5_text_embeddings": embedding, "prompt": "blurred"}, path)
    assert torch.equal(read_negative_embedding(path, 24, 32), embedding)
    with pytest.raises(UserError, match=r"is \[1, 24, 32\], but this model takes \[1, 512, 4096\]"):
        read_negative_embedding(path, 512, 4096)
    torch.save({"embeddings": embedding}, path)
    with pytest.raises(UserError, match="t5_text_embeddings"):
        read_negative_embedding(path, 24, 32)
    torch.save({"t5_text_embeddings": embedding.long()}, path)
    with pytest.raises(UserError, match="t5_text_embeddings"):
        read_negative_embedding(path, 24, 32)
    with pytest.raises(UserError, match="There is no file"):
        read_negative_embedding(tmp_path / "missing.pt", 24, 32)
