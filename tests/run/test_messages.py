"""What other libraries say of mistakes is translated: one line with a remedy, and none of their own advice."""

import io
import zipfile
from pathlib import Path

import pytest
import torch
from helpers import runs
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from PIL import Image
from safetensors.torch import save_file

from mambapeft_vision.adapter.load import load_adapter
from mambapeft_vision.data.images import decode_image
from mambapeft_vision.results.record import read_record
from mambapeft_vision.run.exit import describe_error, is_mistake
from mambapeft_vision.utils.tensor_files import read_tensors
from mambapeft_vision.utils.untrusted import open_zip
