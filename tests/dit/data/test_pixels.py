import numpy as np
import pytest
import torch
from PIL import Image

from dit_qat.dit.data.pictures import center_crop
from dit_qat.dit.data.pixels import Images
from dit_qat.dit.data.sampler import Draw, SequentialDraws, StepBatchSampler
from dit_qat.dit.data.sources import Folder, ImageFolder


@pytest.fixture
def pictures(class_folders):
    return ImageFolder(class_folders)


def test_images_are_cropped_and_in_model_space(pictures):
    dataset = Images(pictures, size=8, seed=0, mirror=False).train_dataset()
    images, labels = dataset[Draw([13, 2], 0)]
    assert images.shape == (2, 3, 8, 8)
    assert images.dtype == torch.float32
    assert labels.tolist() == [1, 0]
    expected = np.array(center_crop(pictures.load(13), 8)) / 127.5 - 1
    assert np.allclose(images[0].permute(1, 2, 0), expected, atol=1e-6)


def test_half_of_the_images_are_mirrored_by_their_place(pictures):
    plain = Images(pictures, size=8, seed=0, mirror=False).train_dataset()
    dataset = Images(pictures, size=8, seed=0).train_dataset()
    image = plain[Draw([4], 0)][0]
    drawn = dataset[Draw([4] * 200, 0)][0]
    kept = (drawn == image).flatten(1).all(1)
    flipped = (drawn == image.flip(-1)).flatten(1).all(1)
    assert (kept ^ flipped).all()
    assert 70 < kept.sum() < 130
    assert torch.equal(dataset[Draw([4] * 50, 30)][0], drawn[30:80])


def test_two_processes_see_the_images_of_one(pictures):
    dataset = Images(pictures, size=8, seed=0).train_dataset()

    def batches(rank, world):
        return [dataset[draw][0] for draw in StepBatchSampler(14, 6, 0, 0, 4, rank, world)]

    pairs = zip(batches(0, 2), batches(1, 2), strict=True)
    shared = torch.cat([torch.cat(pair) for pair in pairs])
    assert torch.equal(shared, torch.cat(batches(0, 1)))


def test_validation_is_fixed_and_unmirrored(pictures):
    def images(**options):
        dataset = Images(pictures, size=8, validation_images=5, **options).validation_dataset()
        return dataset[Draw(list(range(len(dataset))), 0)]

    first, labels = images(seed=0)
    assert first.shape == (5, 3, 8, 8)
    assert torch.equal(first, images(seed=1)[0])
    plain = Images(pictures, size=8, seed=0, mirror=False).train_dataset()[Draw(list(range(14)), 0)]
    found = [int((plain[0] == image).flatten(1).all(1).nonzero()[0]) for image in first]
    assert len(set(found)) == 5
    assert torch.equal(plain[1][found], labels)


def test_a_process_without_validation_images_gets_empty_batches(pictures):
    dataset = Images(pictures, size=8, seed=0).validation_dataset()
    (draw,) = SequentialDraws(len(dataset), batch_size=256, rank=1, world_size=2)
    images, labels = dataset[draw]
    assert images.shape == (0, 3, 8, 8)
    assert (images.dtype, labels.shape) == (torch.float32, (0,))


def test_validation_may_have_pictures_of_its_own(pictures, tmp_path):
    Image.new("RGB", (20, 20), (255, 255, 255)).save(tmp_path / "white.png")
    data = Images(pictures, size=8, seed=0, validation=Folder(tmp_path))
    dataset = data.validation_dataset()
    assert len(dataset) == 1
    assert (dataset[Draw([0], 0)][0] == 1).all()


def test_a_network_that_does_not_fit_is_refused(pictures, class_folders, make_dit):
    data, shape = Images(pictures, size=8, seed=0), {"in_channels": 3, "input_size": 8}
    data.check_network(make_dit(num_classes=2, **shape))
    data.check_network(make_dit(num_classes=0, **shape))
    with pytest.raises(ValueError, match=r"are \(3, 8, 8\), the network takes \(1, 8, 8\)"):
        data.check_network(make_dit(in_channels=1, input_size=8))
    with pytest.raises(ValueError, match="labels up to 1, the network num_classes=1"):
        data.check_network(make_dit(num_classes=1, **shape))
    unlabelled = Images(Folder(class_folders), size=8, seed=0)
    with pytest.raises(ValueError, match="num_classes: 0"):
        unlabelled.check_network(make_dit(**shape))
    assert unlabelled.train_dataset()[Draw([0, 1], 0)][1].tolist() == [0, 0]


def test_unknown_labels_are_refused(pictures, make_dit, monkeypatch):
    labels = torch.full((14,), -1)
    monkeypatch.setattr(ImageFolder, "labels", labels)
    with pytest.raises(ValueError, match="labels from -1 on"):
        Images(pictures, size=8, seed=0).check_network(make_dit(in_channels=3, input_size=8))


@pytest.mark.parametrize("options", [{"size": 0}, {"size": 8, "validation_images": -1}])
def test_options_out_of_range_are_refused(pictures, options):
    with pytest.raises(ValueError, match="must be at least 1"):
        Images(pictures, **options)
