import pytest

from dit_qat.dit.convert.formats import FORMATS
from dit_qat.dit.convert.place import check_place

FILE, FOLDER = FORMATS["published"], FORMATS["diffusers"]


def test_new_names_and_empty_folders_are_free(tmp_path):
    check_place(tmp_path / "a.pt", FILE, ["digits", None], overwrite=False)
    check_place(tmp_path / "a", FOLDER, ["digits"], overwrite=False)
    (tmp_path / "a").mkdir()
    check_place(tmp_path / "a", FOLDER, [], overwrite=False)


@pytest.mark.parametrize("existing", ["a.pt", "a.pt.json"])
def test_files_stay_unless_they_may_go(tmp_path, existing):
    (tmp_path / existing).write_text("precious")
    with pytest.raises(FileExistsError, match=rf"{existing}: there already.*--overwrite"):
        check_place(tmp_path / "a.pt", FILE, [], overwrite=False)
    check_place(tmp_path / "a.pt", FILE, [], overwrite=True)


def test_only_folders_of_a_conversion_may_go(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.tex").write_text("precious")
    with pytest.raises(FileExistsError, match="there already"):
        check_place(tmp_path / "a", FOLDER, [], overwrite=False)
    with pytest.raises(FileExistsError, match=r"no conversion\.json, so no conversion wrote it"):
        check_place(tmp_path / "a", FOLDER, [], overwrite=True)
    (tmp_path / "a" / "conversion.json").write_text("{}")
    check_place(tmp_path / "a", FOLDER, [], overwrite=True)


def test_names_tell_what_they_hold(tmp_path):
    with pytest.raises(ValueError, match=r"a\.bin: this format is a file named \*\.pt or \*\.pth"):
        check_place(tmp_path / "a.bin", FILE, [], overwrite=False)
    with pytest.raises(ValueError, match=r"a\.safetensors: this format is a folder"):
        check_place(tmp_path / "a.safetensors", FOLDER, [], overwrite=False)
    (tmp_path / "b.pt").mkdir()
    with pytest.raises(IsADirectoryError, match="name a file in it"):
        check_place(tmp_path / "b.pt", FILE, [], overwrite=True)
    (tmp_path / "c").write_text("")
    with pytest.raises(NotADirectoryError, match="c is a file"):
        check_place(tmp_path / "c", FOLDER, [], overwrite=True)


def test_sources_are_not_replaced(tmp_path):
    inner = tmp_path / "pipe" / "transformer"
    inner.mkdir(parents=True)
    (tmp_path / "pipe" / "conversion.json").write_text("{}")
    for target in (tmp_path / "pipe", inner):
        with pytest.raises(ValueError, match="is, or holds, the source"):
            check_place(target, FOLDER, ["digits", str(inner)], overwrite=True)
    check_place(tmp_path / "pipe2", FOLDER, [str(inner)], overwrite=True)
