from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from conftest import build_model, build_text_classifier
from palimpsest.data.labelled import collate, labelled
from palimpsest.data.records import Record, Roles
from palimpsest.errors import PalimpsestError
from palimpsest.models.model import Model

PIXELS = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
IMAGES = [Record(image=image, label=label) for label, image in enumerate(PIXELS)]
TEXTS = [
    Record(text="Where was Ada Moreau born ?", label=2),
    Record(text="It is known", label=0),
    Record(prompt="What does Dai Tanaka do for a living ?", answer="kite painter", label=1),
]


def test_images_become_one_batch_in_order():
    inputs, labels = collate(labelled(build_model("vit"), IMAGES), "cpu")
    assert torch.equal(inputs["pixel_values"], PIXELS)
    assert labels.tolist() == [0, 1, 2, 3]
    assert [example.index for example in labelled(build_model("vit"), IMAGES)] == [0, 1, 2, 3]


def test_arrays_and_tensors_are_the_same_image_and_have_the_same_digest():
    arrays = [Record(image=image.numpy(), label=label) for label, image in enumerate(PIXELS)]
    one, other = (collate(labelled(build_model("convnet"), records), "cpu")[0] for records in (IMAGES, arrays))
    assert torch.equal(one["pixel_values"], other["pixel_values"])
    assert Roles(train=IMAGES).digest() == Roles(train=arrays).digest()
    assert Roles(train=IMAGES).digest() != Roles(train=IMAGES[::-1]).digest()


def test_images_are_given_in_the_precision_of_the_network():
    model = build_model("convnet")
    model.network.bfloat16()
    inputs, _ = collate(labelled(model, IMAGES), "cpu")
    assert inputs["pixel_values"].dtype == torch.bfloat16
    model.network(**inputs)


def test_an_image_processor_prepares_pictures():
    processor = transformers.ViTImageProcessorPil(size={"height": 16, "width": 16})
    model = Model(build_model("vit").network, processor)
    pixels = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    records = [Record(image=Image.fromarray(pixels), label=1), Record(image=Image.fromarray(pixels[:9]), label=0)]
    inputs, _ = collate(labelled(model, records), "cpu")
    assert inputs["pixel_values"].shape == (2, 3, 16, 16)
    expected = processor(records[0].image, return_tensors="pt")["pixel_values"]
    assert torch.equal(inputs["pixel_values"][:1], expected)


def test_padded_texts_are_classified_as_if_each_stood_alone():
    model = build_text_classifier()
    examples = labelled(model, TEXTS)
    inputs, labels = collate(examples, "cpu")
    assert labels.tolist() == [2, 0, 1]
    assert inputs["attention_mask"].sum(1).tolist() == [6, 3, 9]
    assert [example.size for example in examples] == [6, 3, 9]
    with torch.no_grad():
        together = model.network(**inputs).logits
        alone = torch.cat([model.network(**collate([example], "cpu")[0]).logits for example in examples])
    torch.testing.assert_close(together, alone)


def test_texts_are_cut_and_that_is_said():
    said: list[str] = []
    examples = labelled(build_text_classifier(), TEXTS, max_length=4, warn=said.append)
    assert [example.size for example in examples] == [4, 3, 4]
    assert said == ["2 of 3 records are longer than 4 tokens; 7 tokens were cut."]
    assert labelled(build_text_classifier(max_position_embeddings=5), TEXTS)[2].size == 5


@pytest.mark.parametrize(
    ("record", "told"),
    [
        (Record(image=PIXELS[0]), r'record 2 \("an image"\) has no label'),
        (Record(image=PIXELS[0], label=4), r"has the label 4, but the network has labels 0 to 3"),
        (Record(image=PIXELS[0], label=-1), r"has the label -1, but"),
        (Record(image=PIXELS[0], label=1.5), r"has the label 1\.5, expected a whole number"),  # type: ignore[arg-type]
        (Record(text="a cat", label=1), r'record 2 \("a cat"\) has no image, but ViTForImageClassification'),
        (Record(image="cat.png", label=1), r"an image of type str, but the model has no image processor"),
        (Record(image=PIXELS[0, 0], label=1), r"of shape \[16, 16\], expected \[3, 16, 16\]"),
        (Record(image=PIXELS[:1], label=1), r"of shape \[1, 3, 16, 16\], expected \[3, 16, 16\]"),
        (Record(image=PIXELS[0, :1], label=1), r"of shape \[1, 16, 16\], expected \[3, 16, 16\]"),
        (Record(image=(255 * PIXELS[0]).byte(), label=1), r"the type torch\.uint8, expected finite floating-point"),
        (Record(image=PIXELS[0] / 0, label=1), r"values that are no numbers, expected finite"),
    ],
)
def test_what_a_network_cannot_classify_is_named(record, told):
    with pytest.raises(PalimpsestError, match=told):
        labelled(build_model("vit"), [IMAGES[0], record])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_value_that_is_no_number_is_enough(bad):
    pixels = PIXELS[0].clone()
    pixels[1, 2, 3] = bad
    with pytest.raises(PalimpsestError, match="values that are no numbers"):
        labelled(build_model("vit"), [Record(image=pixels, label=1)])


def test_values_are_finite_however_large_their_sum():
    (example,) = labelled(build_model("vit"), [Record(image=torch.full((3, 16, 16), 3e38), label=1)])
    assert float(example.inputs["pixel_values"].min()) == pytest.approx(3e38)


def test_images_of_different_sizes_are_refused_where_the_network_takes_any():
    records = [IMAGES[0], Record(image=PIXELS[0, :, :8], label=0)]
    with pytest.raises(PalimpsestError, match=r"image of shape \[3, 8, 16\], the first has \[3, 16, 16\]"):
        labelled(build_model("convnet"), records)


def test_a_text_classifier_needs_a_text_and_a_padding_token():
    with pytest.raises(PalimpsestError, match=r'record 1 \("an image"\) has neither a text nor a prompt'):
        labelled(build_text_classifier(), [Record(image=PIXELS[0], label=1)])
    with pytest.raises(PalimpsestError, match=r"does not say which token pads \(config\.pad_token_id is none\)"):
        labelled(build_text_classifier(pad_token_id=None), TEXTS)


def test_other_networks_and_other_problems_are_refused(llama):
    with pytest.raises(PalimpsestError, match="LlamaForCausalLM is no classifier"):
        labelled(llama, TEXTS)
    with pytest.raises(PalimpsestError, match="has 3 labels and the problem type multi_label_classification"):
        labelled(build_text_classifier(problem_type="multi_label_classification"), TEXTS)
    with pytest.raises(PalimpsestError, match="has 1 labels and the problem type None"):
        labelled(build_text_classifier(num_labels=1), TEXTS)


def test_nothing_to_classify_is_refused():
    with pytest.raises(PalimpsestError, match="there is nothing to classify"):
        collate([], "cpu")
