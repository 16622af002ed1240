"""What stands at the end of an error line: a name that is alike, a package to install."""

from rewrite.text.suggest import did_you_mean, how_to_install


def test_close_names_are_offered_and_no_others() -> None:
    assert did_you_mean("reset18", ["resnet18", "vgg16"]) == "; did you mean resnet18?"
    assert did_you_mean("xyzzy", ["resnet18", "vgg16"]) == ""
    assert did_you_mean("reset18", ["resnet18"], shown={"resnet18": "timm:resnet18"}).endswith(
        " timm:resnet18?"
    )


def test_how_alike_two_names_are_is_a_choice() -> None:
    assert did_you_mean("nrom", ["norm1"], cutoff=0.9) == ""
    assert did_you_mean("nrom", ["norm1"], cutoff=0.6) == "; did you mean norm1?"


def test_only_a_package_that_an_index_knows_by_its_name_is_named() -> None:
    def missing(name: str) -> str:
        return how_to_install(ModuleNotFoundError("no module", name=name))

    assert missing("timm.models") == "; pip install timm"
    assert missing("my_models") == "; install the package that holds it"
    assert how_to_install(ImportError("cannot import name 'x' from 'timm'")) == ""
    assert how_to_install(ModuleNotFoundError("no name")) == ""
