"""The equations: layers and models, with no files, no training and no launcher."""

from gfrnn.nn.build import Model, build_language_model, build_model
from gfrnn.nn.encoder_decoder import EncoderDecoder
from gfrnn.nn.language_model import LanguageModel
from gfrnn.nn.multiplicative import MultiplicativeRNN
from gfrnn.nn.noise import Noise
from gfrnn.nn.rnn import GatedFeedbackRNN, State

__all__ = [
    "EncoderDecoder",
    "GatedFeedbackRNN",
    "LanguageModel",
    "Model",
    "MultiplicativeRNN",
    "Noise",
    "State",
    "build_language_model",
    "build_model",
]
