"""Make tests/golden/keras_cnn.onnx and keras_cnn.npz: a small network of Keras, and what Keras itself says of pictures.

The tests compare featcache's features from the ONNX file with these numbers. They need neither Keras nor TensorFlow;
this program does, in an environment of its own::

    pip install keras tensorflow-cpu tf2onnx onnx
    python scripts/golden/keras_cnn.py tests/golden

keras_cnn.npz holds `images` (6, 32, 32, 3) uint8, Keras's `outputs` (6, 10) for pixels in [0, 255], its `inner` layer
(6, 16, 16, 12) with the name `inner_name` of that tensor in the ONNX file, and `versions`.
"""

import os

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"

import sys
from importlib.metadata import version
from pathlib import Path

import keras
import numpy as np
import onnx
from keras import layers

PACKAGES = ("keras", "tensorflow-cpu", "tf2onnx", "onnx", "numpy")


def make_network() -> keras.Model:
    """A CNN that takes (N, 32, 32, 3) pixels in [0, 255] and scales them itself."""
    keras.utils.set_random_seed(7)
    images = keras.Input((32, 32, 3), name="images")
    maps = layers.Rescaling(1 / 127.5, offset=-1)(images)
    maps = layers.Conv2D(12, 3, strides=2, padding="same", use_bias=False)(maps)
    maps = layers.BatchNormalization()(maps)
    maps = layers.Activation("relu", name="inner")(maps)
    maps = layers.SeparableConv2D(24, 3, padding="same", activation="swish")(maps)
    maps = layers.MaxPooling2D()(maps)
    features = layers.GlobalAveragePooling2D()(maps)
    return keras.Model(images, layers.Dense(10, name="features")(features))


def disturb(network: keras.Model) -> None:
    """Statistics and biases as after some training, or one that is skipped would not be noticed."""
    random = np.random.default_rng(7)
    for layer in network.layers:
        if isinstance(layer, layers.Dense):
            layer.bias.assign(random.normal(0, 0.3, layer.bias.shape))
        if isinstance(layer, layers.BatchNormalization):
            gamma, beta, mean, variance = (np.asarray(one) for one in layer.get_weights())
            layer.set_weights(
                [
                    gamma * random.uniform(0.5, 2, gamma.shape),
                    beta + random.normal(0, 0.3, beta.shape),
                    mean + random.normal(0, 0.2, mean.shape),
                    variance * random.uniform(0.5, 2, variance.shape),
                ]
            )


def draw_images() -> np.ndarray:
    """Six noisy gradients, (6, 32, 32, 3) uint8: no two channels and no two sides of them are alike."""
    random = np.random.default_rng(11)
    down, across = np.mgrid[0:32, 0:32] / 31
    pictures = [np.stack([down * a, across * b, (1 - down) * c], axis=-1) for a, b, c in random.uniform(0, 1, (6, 3))]
    noisy = np.stack(pictures) * 200 + random.uniform(0, 55, (6, 32, 32, 3))
    return noisy.astype(np.uint8)


def find_inner(path: Path) -> str:
    """The tensor that the ReLU of the ONNX file gives."""
    return next(node.output[0] for node in onnx.load(path).graph.node if node.op_type == "Relu")


def main(folder: Path) -> None:
    """Write both files."""
    network, images = make_network(), draw_images()
    disturb(network)
    pixels = images.astype(np.float32)
    inner = keras.Model(network.input, network.get_layer("inner").output)
    outputs = np.asarray(network(pixels, training=False))  # before its export, which wants it called once
    network.export(folder / "keras_cnn.onnx", format="onnx", verbose=False)
    np.savez_compressed(
        folder / "keras_cnn.npz",
        images=images,
        outputs=outputs,
        inner=np.asarray(inner(pixels, training=False)),
        inner_name=find_inner(folder / "keras_cnn.onnx"),
        versions=[f"{name} {version(name)}" for name in PACKAGES],
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
