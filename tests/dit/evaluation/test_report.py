"""Protocol cards, published protocols, and reports of both."""

import json
from dataclasses import replace

import pytest

from dit_qat.dit.evaluation import save_npz
from dit_qat.dit.evaluation.extraction import Networks
from dit_qat.dit.evaluation.inception import INCEPTION_SHA256
from dit_qat.dit.evaluation.protocol import ADM_REFERENCE, UNKNOWN, find_record, protocol_of
from dit_qat.dit.evaluation.published import PUBLISHED, compare, fitting_published
from dit_qat.dit.evaluation.references import open_reference
from dit_qat.dit.evaluation.report import make_report
from dit_qat.dit.evaluation.scoring import Comparison, Scores
from dit_qat.dit.evaluation.sources import file_sha256, open_images

RECORD = {
    "num_samples": 8,
    "source": "run/last.ckpt",
    "weights_sha256": "w" * 64,
    "labels": [0, 1, 2, 3] * 2,
    "sampler": {
        "kind": "ddpm",
        "steps": 250,
        "spacing": "linspace",
        "guidance": 1.5,
        "guided_channels": 3,
        "seed": 7,
        "precision": "bf16",
    },
    "latent_space": {"source": "sd-vae-ft-ema", "sha256": "v" * 64, "scaling_factor": 0.18215},
    "versions": {"torch": "2.15"},
}


@pytest.fixture
def folder(make_images, tmp_path):
    save_npz(tmp_path / "run" / "samples.npz", make_images(8))
    (tmp_path / "run" / "metrics.json").write_text(json.dumps(RECORD))
    save_npz(tmp_path / "real.npz", make_images(9))
    return tmp_path / "run"


@pytest.fixture
def comparison(folder, small_inception):
    reference = open_reference(folder.parent / "real.npz")
    return Comparison(open_images(folder), ["fid", "kid"], Networks(small_inception), reference)


@pytest.fixture
def card(comparison):
    return protocol_of(comparison, find_record(comparison.samples))


@pytest.fixture
def as_published(card):
    """The card of somebody who did what the DiT README does."""
    return replace(
        card,
        num_samples=50_000,
        shape=(3, 256, 256),
        classes=1000,
        reference_kind=ADM_REFERENCE,
        extractor_sha256=INCEPTION_SHA256,
    )


def test_the_card_holds_what_was_recorded_and_what_was_computed(card, folder):
    assert (card.sampler, card.steps, card.spacing) == ("ddpm", 250, "linspace")
    assert (card.guidance, card.guided_channels, card.seed) == (1.5, 3, 7)
    assert (card.vae, card.vae_sha256, card.vae_scaling) == ("sd-vae-ft-ema", "v" * 64, 0.18215)
    assert (card.network_sha256, card.precision, card.conditional) == ("w" * 64, "bf16", True)
    assert (card.classes, card.reference_shape) == (4, (3, 8, 8))
    assert card.samples_sha256 == file_sha256(folder / "samples.npz")
    assert card.reference_sha256 == file_sha256(folder.parent / "real.npz")
    assert (card.reference_kind, card.reference_count, card.reference_images) == ("images", 9, 9)
    assert card.extractor_sha256 == "5" * 64
    assert "100 subsets of 8" in card.details["kid"]
    assert "127.5" in card.rounding
    assert {"torch", "torch-fidelity", "dit_qat"} <= card.versions.keys()


def test_what_nobody_wrote_down_is_unknown(comparison):
    card = protocol_of(comparison, {})
    fields = ("guidance", "steps", "sampler", "vae", "seed", "network", "rounding", "conditional")
    fields = (*fields, "classes")
    assert {getattr(card, name) for name in fields} == {UNKNOWN}


def test_pixels_have_no_autoencoder(comparison):
    card = protocol_of(comparison, {**RECORD, "latent_space": None, "labels": None})
    assert card.vae.startswith("none")
    assert card.vae_scaling is None
    assert card.conditional is False
    assert card.classes is None


class TestRecords:
    def test_of_strangers_are_not_read(self, folder, make_images):
        save_npz(folder / "other.npz", make_images(8))
        assert find_record(open_images(folder / "other.npz")) == {}
        assert find_record(open_images(folder)) == RECORD

    def test_of_another_number_of_images(self, folder, make_images):
        save_npz(folder / "samples.npz", make_images(6))
        with pytest.raises(ValueError, match="speaks of 8 images, there are 6"):
            find_record(open_images(folder))

    def test_of_unfinished_runs(self, folder):
        (folder / "metrics.json").rename(folder / "sampling.json")
        with pytest.raises(ValueError, match="is not finished; repeat its command"):
            find_record(open_images(folder))

    @pytest.mark.parametrize(("text", "message"), [("{", "damaged"), ("[]", "no record")])
    def test_damaged(self, folder, text, message):
        (folder / "metrics.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            find_record(open_images(folder))


class TestPublished:
    def test_the_same_protocol_has_no_deviation(self, as_published):
        assert fitting_published(as_published) == "dit"
        assert compare(as_published, PUBLISHED["dit"]) == []

    @pytest.mark.parametrize(
        ("field", "ours", "why"),
        [
            ("num_samples", 10_000, "4.53 with 10,000"),
            ("guidance", 4.0, "quantized models get a lower FID than the float one"),
            ("steps", 50, "number of steps"),
            ("sampler", "ddim", "sampler"),
            ("guided_channels", None, "first 3 of 4"),
            ("classes", 10, "samples of some"),
            ("vae", "stabilityai/sd-vae-ft-mse", "2.30 with sd-vae-ft-mse"),
            ("vae", "/here/pipeline/vae", "names are compared"),
            ("reference_kind", "images", "ADM's statistics"),
            ("extractor_sha256", "0" * 64, "no FID"),
        ],
    )
    def test_each_deviation_is_named_with_both_values_and_why(self, as_published, field, ours, why):
        (found,) = compare(replace(as_published, **{field: ours}), PUBLISHED["dit"])
        assert found.field == field
        assert found.ours == (ours[:16] if field == "extractor_sha256" else ours)
        assert why in str(found)
        assert f"{found.ours} here, {found.theirs} there" in str(found)

    def test_a_copy_of_the_autoencoder_is_known_by_its_name(self, as_published):
        for name in ("stabilityai/sd-vae-ft-ema", "/weights/sd-vae-ft-ema"):
            assert compare(replace(as_published, vae=name), PUBLISHED["dit"]) == []

    def test_the_protocol_of_10_000_samples_is_another(self, as_published):
        theirs = {"num_samples": 10_000, "vae": "stabilityai/sd-vae-ft-mse"}
        assert compare(replace(as_published, **theirs), PUBLISHED["ptq4dit"]) == []
        found = compare(replace(as_published, **theirs, guidance=4.0), PUBLISHED["ptq4dit"])
        assert [deviation.field for deviation in found] == ["guidance"]

    def test_other_weights_count_even_without_a_paper(self, card):
        assert [deviation.field for deviation in compare(card, None)] == ["extractor_sha256"]

    def test_small_or_unconditional_images_have_no_paper(self, as_published):
        assert fitting_published(replace(as_published, conditional=False)) is None
        assert fitting_published(replace(as_published, shape=(3, 32, 32))) is None
        assert fitting_published(replace(as_published, conditional=UNKNOWN)) == "dit"

    def test_the_numbers_are_those_of_the_papers(self):
        scores = {"fid": 2.27, "sfid": 4.60, "is": 278.24, "precision": 0.83, "recall": 0.57}
        assert PUBLISHED["dit"].scores == scores
        assert PUBLISHED["ptq4dit"].scores == {"fid": 4.53}
        assert PUBLISHED["dit"].facts["num_samples"] == 50_000
        assert PUBLISHED["ptq4dit"].facts["num_samples"] == 10_000


class TestReports:
    @pytest.mark.parametrize(
        ("metrics", "shape", "warned"),
        [(["kid"], (3, 16, 16), True), (["is"], (3, 16, 16), False), (["kid"], (3, 8, 8), False)],
    )
    def test_sides_of_several_sizes(
        self, comparison, make_images, tmp_path, metrics, shape, warned
    ):
        save_npz(tmp_path / "other.npz", make_images(9, shape=shape))
        reference = open_reference(tmp_path / "other.npz")
        compared = replace(comparison, metrics=metrics, reference=reference)
        warnings = "".join(make_report(compared, Scores({}, {}), RECORD).warnings)
        assert ("the samples are 3 x 8 x 8 and the images of" in warnings) == warned
        assert ("3 x 16 x 16" in warnings) == warned

    def test_loud_warnings_and_the_published_number(self, comparison):
        report = make_report(comparison, Scores({"fid": 9.5}, {}), RECORD, "dit", ["few"], ["n"])
        block = report.warning_block()
        assert "WARNING" in block
        assert "* few" in block
        assert "num_samples: 8 here, 50000 there" in block
        assert "guidance" not in block
        table = report.table()
        assert "published: 2.27" in table
        assert "DiT README" in table
        assert "5" * 64 in table
        assert "note: n" in table
        content = json.loads(json.dumps(report.content()))
        assert content["metrics"] == {"fid": 9.5}
        assert content["protocol"]["guidance"] == 1.5
        assert content["published"]["scores"]["fid"] == 2.27
        assert content["warnings"] == list(report.warnings)

    def test_unknown_fields_share_a_warning(self, comparison):
        report = make_report(comparison, Scores({}, {}), {}, "ptq4dit")
        assert "steps (250 there)" in report.warnings[-1]
        assert report.warnings[-1].startswith("unknown here")

    def test_silence_where_nothing_differs(self, comparison, small_inception):
        small_inception.sha256 = INCEPTION_SHA256
        report = make_report(comparison, Scores({}, {}), RECORD)
        assert report.published is None
        assert report.warning_block() == ""
