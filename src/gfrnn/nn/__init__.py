"""The equations: layers and models, with no files, no training and no launcher."""

from gfrnn.nn.language_model import LanguageModel, build_language_model
from gfrnn.nn.multiplicative import MultiplicativeRNN
from gfrnn.nn.noise import Noise
from gfrnn.nn.rnn import GatedFeedbackRNN, State

__all__ = ["GatedFeedbackRNN", "LanguageModel", "MultiplicativeRNN", "Noise", "State", "build_language_model"]
