"""From labelled videos to a policy: what fits together goes through, exactly; what does not is refused."""

import shutil
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from headrace.datasets.latent_labels import LabelHeader, LabelledSource, LatentLabels, write_part
from headrace.datasets.video_clips import VideoClips
from headrace.datasets.video_scan import BadVideo
from headrace.datasets.video_source import video_folder
from headrace.robot import pretrain as stage
from headrace.robot.frame_codes import frames_to_codes
from headrace.robot.pretrain_data import Prepare
from headrace.robot.sizes import trunk_config
from headrace.robot.token_cache import FrameTokens, cache_tokens
from headrace.robot.vipra_pretraining import VipraPretraining
from headrace.tokenizers.tokenflow import TokenFlow, TokenFlowConfig

LENGTHS, HORIZON = (7, 5, 6), 4


def picture(video: int, step: int) -> np.ndarray:
    y, x = np.mgrid[:64, :64]
    return np.stack([(x * 3 + 9 * step) % 256, (y * 3 + 50 * video) % 256, np.full_like(x, 40 * video)], -1).astype(
        "u1"
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("pretraining")
    (root / "clips").mkdir()
    for video, length in enumerate(LENGTHS):
        with av.open(str(root / "clips" / f"{video}.mp4"), "w") as out:
            stream = out.add_stream("h264", rate=10)
            stream.width = stream.height = 64
            stream.pix_fmt = "yuv420p"
            for step in range(length):
                out.mux(stream.encode(av.VideoFrame.from_ndarray(picture(video, step), format="rgb24")))
            out.mux(stream.encode())
        (root / "clips" / f"{video}.txt").write_text(["push the cube", "pull it", "push it"][video])
    torch.manual_seed(0)
    TokenFlow(TokenFlowConfig.tiny()).eval().save_pretrained(root / "tokenizer")
    write_labels(root)
    return root


def write_labels(root: Path) -> None:
    source = video_folder(root / "clips")
    corpus = VideoClips([source], image_size=64)
    header = LabelHeader(
        lam="lam", lam_hash="a" * 16, codes=8, tokens=2, horizon=HORIZON, history=1, image_size=64,
        corpus=corpus.fingerprint(), parts=1, rows_per_part=100, every=1,
        sources=(LabelledSource(name=source.name, videos=3, frames=sum(LENGTHS), rate=10.0),),
    )  # fmt: skip
    rows: dict[str, list] = {name: [] for name in
        ("source", "video", "instruction", "frame", "stride", "past", "future", "transitions")}  # fmt: skip
    for video, length in zip(source.videos, LENGTHS, strict=True):
        for frame in range(length - 1):
            rows["source"].append(source.name)
            rows["video"].append(video.name)
            rows["instruction"].append(video.instruction)
            rows["frame"].append(frame)
            rows["stride"].append(1)
            rows["past"].append(max(frame - 1, 0))
            rows["future"].append(min(frame + HORIZON, length - 1))
            rows["transitions"].append(min(HORIZON, length - 1 - frame))
    codes = np.random.default_rng(0).integers(8, size=(len(rows["frame"]), HORIZON, 2))
    (root / "labels").mkdir()
    header.save(root / "labels")
    write_part(root / "labels", 0, header, rows, codes)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("HEADRACE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def setup(folder: Path, *, fields: stage.Fields = "ls_la", ids: bool = False):
    labels, encoder = LatentLabels(folder / "labels"), stage.open_encoder(folder / "tokenizer")
    trunk = trunk_config("tiny", cameras=("video",), camera_size=64, encoder=encoder.config if ids else None)
    config = stage.config_for(trunk, labels, encoder, fields=fields)
    data = stage.open_data([video_folder(folder / "clips")], labels, config, encoder, folder / "tokens")
    torch.manual_seed(0)
    model = VipraPretraining(config)
    if ids:
        model.image_tokens.encoder.load_state_dict(encoder.state_dict())
    return model, data, encoder


def test_a_sample_is_its_frame_its_future_and_its_codes(folder):
    _, data, encoder = setup(folder)
    row = next(i for i in range(len(data)) if data.labels.video[i].startswith("1") and data.labels.frame[i] == 2)
    batch = data.batch(np.array([0, row]))
    frames = data.corpus.read(int(data._videos[row]), np.array([2, 4]))
    assert torch.equal(batch.images[1, 0, 0], torch.from_numpy(frames[0]))
    expected = frames_to_codes(encoder, torch.from_numpy(frames[1:]).permute(0, 3, 1, 2))
    assert torch.equal(batch.future[1], expected[0])
    assert batch.latents[1].tolist() == data.labels.codes[row].flatten().tolist()
    assert batch.instructions[1] == "pull it"


def test_one_latent_step_is_the_first(folder):
    _, data, _ = setup(folder, fields="ls_la1")
    assert data.batch(np.array([3])).latents.tolist() == [data.labels.codes[3, 0].tolist()]


def test_cached_tokens_go_on_after_a_kill_and_know_their_corpus(folder, tmp_path):
    encoder = stage.open_encoder(folder / "tokenizer")
    corpus = VideoClips([video_folder(folder / "clips")], image_size=64)
    whole = cache_tokens(corpus, encoder, tmp_path, crop=(0, 0, 64), frames_per_part=6)
    videos, frames = np.array([0, 1, 2, 2]), np.array([6, 0, 5, 1])
    wanted = whole.read(videos, frames)
    own = next(tmp_path.iterdir())
    (own / "part-00001.npy").unlink()
    with pytest.raises(ValueError, match="lacks 1 of"):
        FrameTokens(own, corpus)
    made: list[int] = []
    again = cache_tokens(
        corpus, encoder, tmp_path, crop=(0, 0, 64), frames_per_part=6, done=lambda part, _: made.append(part)
    )
    assert made == [1] and torch.equal(again.read(videos, frames), wanted)
    other = VideoClips([video_folder(folder / "clips", name="other")], image_size=64)
    with pytest.raises(ValueError, match="another corpus"):
        FrameTokens(own, other)


def test_processes_share_the_parts_of_the_cache(folder, tmp_path):
    _, data, encoder = setup(folder)
    whole = cache_tokens(data.corpus, encoder, tmp_path / "one", crop=(0, 0, 64), frames_per_part=6)
    made: list[int] = []
    options = {"crop": (0, 0, 64), "frames_per_part": 6, "done": lambda part, _: made.append(part)}

    def second() -> None:  # runs while the first process waits
        made.append(-1)
        cache_tokens(data.corpus, encoder, tmp_path / "two", shard=(1, 2), **options)

    shared = cache_tokens(data.corpus, encoder, tmp_path / "two", shard=(0, 2), wait=second, **options)
    assert made == [*range(0, whole.header.parts, 2), -1, *range(1, whole.header.parts, 2)] and whole.header.parts > 1
    assert torch.equal(shared.read(np.array([1, 2]), np.array([4, 0])), whole.read(np.array([1, 2]), np.array([4, 0])))


def test_a_damaged_video_ends_neither_the_cache_nor_the_batches(folder, tmp_path, monkeypatch):
    model, data, encoder = setup(folder)
    read = VideoClips.read

    def failing(corpus, number, frames):
        if number == 1:
            raise BadVideo("corrupt", "1.mp4 cannot be decoded")
        return read(corpus, number, frames)

    monkeypatch.setattr(VideoClips, "read", failing)
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"1 of 3 videos have no ids \(1 corrupt\)"):
            tokens = cache_tokens(data.corpus, encoder, tmp_path, crop=(0, 0, 64))
    assert tokens.damaged.tolist() == [1]
    with pytest.warns(UserWarning, match="4 of 15 labelled frames are left out: 1 video"):
        less = type(data)(data.labels, data.corpus, tokens, model.config)
    assert len(less) == sum(LENGTHS) - 3 - (LENGTHS[1] - 1)
    assert set(less.batch(np.arange(len(less))).instructions) == {"push the cube", "push it"}
    # Without a cache that knows, the damage shows at the first picture, and the next readable frame stands in.
    with pytest.warns(UserWarning, match="left out from here on, 1 video"):
        late = data.batch(np.array([LENGTHS[0] - 1, LENGTHS[0]]))
    assert late.instructions == ["push it"] * 2


def test_a_repaired_video_gets_its_ids(folder, tmp_path, monkeypatch):
    _, data, encoder = setup(folder)
    read, asked = VideoClips.read, []

    def failing(corpus, number, frames):
        asked.append(number)
        if number == 1 and len(set(asked)) == 2:
            raise BadVideo("corrupt", "1.mp4 cannot be decoded")
        return read(corpus, number, frames)

    monkeypatch.setattr(VideoClips, "read", failing)
    with pytest.warns(UserWarning, match="have no ids"):
        cache_tokens(data.corpus, encoder, tmp_path, crop=(0, 0, 64))
    asked[:] = [0, 2]  # so that video 1 can be read now, as no third one is new
    with pytest.warns(UserWarning, match=r"1 videos that had no ids can be read now"):
        tokens = cache_tokens(data.corpus, encoder, tmp_path, crop=(0, 0, 64))
    assert asked == [0, 2, 1] and not len(tokens.damaged)
    videos, frames = np.array([0, 1, 2]), np.array([6, 4, 5])
    assert torch.equal(tokens.read(videos, frames), data.tokens.read(videos, frames))


def test_sources_of_nearly_one_rate_have_that_rate(folder):
    """30 and 29.97 frames a second, read at 5."""
    labels = LatentLabels(folder / "labels")
    (source,) = labels.header.sources

    def rate(*rates):
        sources = tuple(replace(source, name=str(r), rate=r) for r in rates)
        labels.header = replace(labels.header, sources=sources)
        return stage.labelled_rate(labels)

    assert rate(5.0, 4.995) == 5.0
    assert rate(5.0, 4.8) is None and rate(5.0, None) is None


@pytest.mark.parametrize("ids", [False, True])
def test_resumed_pretraining_gives_the_same_losses(folder, tmp_path, ids):
    settings = stage.PretrainSettings(steps=4, batch_size=3, lr=1e-3, precision="fp32", checkpoint_every=2, log_every=1)
    model, data, _ = setup(folder, ids=ids)
    whole = stage.pretrain(model, data, settings, tmp_path / "a").losses
    model, data, _ = setup(folder, ids=ids)
    short = replace(settings, steps=2)
    first = stage.pretrain(model, data, short, tmp_path / "b", facts=None).losses
    assert whole[:2] == first and whole[-1] < whole[0]
    assert (tmp_path / "b" / "model" / "model.safetensors").is_file()


def test_a_killed_run_resumes_exactly(folder, tmp_path):
    settings = stage.PretrainSettings(steps=4, batch_size=3, lr=1e-3, precision="fp32", checkpoint_every=2, log_every=1)
    model, data, _ = setup(folder)
    whole = stage.pretrain(model, data, settings, tmp_path / "a").losses
    shutil.rmtree(tmp_path / "a" / "checkpoints" / "step_00000004")
    model, data, _ = setup(folder)
    assert stage.pretrain(model, data, settings, tmp_path / "a", resume=True).losses == whole[2:]


def test_labels_of_another_model_are_refused(folder):
    with pytest.raises(ValueError, match="these labels were made by"):
        LatentLabels(folder / "labels", lam_hash="b" * 16)
    model, data, _ = setup(folder)
    with pytest.raises(ValueError, match="these labels were made by"):
        wrong = replace(model.config, record=replace(model.config.record, lam_hash="b" * 16))
        type(data)(data.labels, data.corpus, data.tokens, wrong)


def test_labels_of_other_videos_and_tokens_of_another_tokenizer_are_refused(folder, tmp_path):
    model, data, encoder = setup(folder)
    other = [video_folder(folder / "clips", stride=2)]
    with pytest.raises(ValueError, match="other videos or strides"):
        stage.open_data(other, data.labels, model.config, encoder, tmp_path)
    wrong = replace(model.config, record=replace(model.config.record, tokenizer_hash="b" * 16))
    with pytest.raises(ValueError, match="made by tokenizer"):
        type(data)(data.labels, data.corpus, data.tokens, wrong)


def test_cached_ids_cannot_be_moved(folder):
    model, _, _ = setup(folder, ids=True)
    with pytest.raises(ValueError, match="move=0"):
        Prepare(model.config, model.encode_text, move=4)


def test_the_context_moves_only_where_no_future_frame_is_predicted(folder):
    model, _, _ = setup(folder)
    with pytest.raises(ValueError, match="context cannot be moved by 4 px"):
        Prepare(model.config, model.encode_text, move=4)
    model, _, _ = setup(folder, fields="la")
    Prepare(model.config, model.encode_text, move=4)


def test_a_language_model_gives_shape_weights_and_text(folder, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", "push", "pull", "the", "cube", "it", "vision", "dynamics", "<", "</", ">"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    text = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    language = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(words),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )
    language.save_pretrained(tmp_path)
    text.save_pretrained(tmp_path)
    labels, encoder = LatentLabels(folder / "labels"), stage.open_encoder(folder / "tokenizer")
    trunk = trunk_config(
        "tiny", cameras=("video",), camera_size=64, encoder=encoder.config, backbone=stage.backbone_of(tmp_path)
    )
    config = stage.config_for(trunk, labels, encoder, text=stage.text_tokenizer(tmp_path))
    model = VipraPretraining(config).eval()
    fresh = stage.start_from_language_model(model, tmp_path)
    assert not [name for name in fresh if name.startswith(("backbone.", "text."))]
    weight = language.model.layers[1].mlp.up_proj.weight
    assert torch.equal(model.backbone.layers[1].mlp.up_proj.weight, weight)
    data = stage.open_data([video_folder(folder / "clips")], labels, config, encoder, folder / "tokens")
    batch = Prepare(config, model.encode_text)(data.batch(np.array([0, 8])), torch.Generator())
    assert batch.text.min() == -1  # the shorter instruction is padded
    with torch.no_grad():
        terms = model.loss(batch)
    # The released layout: delimiters are text, and so is the smallest share of the loss.
    assert model.layout.loss_weights == {"text": 0.02, "visual": 0.48, "latent": 0.48}
    torch.testing.assert_close(terms["total"], 0.48 * (terms["visual"] + terms["latent"]) + 0.02 * terms["spelling"])
