"""An LSTM whose gradient gains from bfloat16 too."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LSTM(nn.LSTM):
    """torch's, one layer, batch first: (B, L, I) and float32 (1, B, H) twice -> (B, L, H) and the state after.

    Under autocast on a CPU, with a gradient, it is `Unrolled`: oneDNN's backward pass takes as long in bfloat16 as in float32 (B 16, L 80,
    H 512, one thread with AVX512-BF16: 215 ms forward and back, here 150). On a GPU it is cuDNN's in float32: torch's autocast would make
    it float16, whatever it was asked for.
    """

    def __init__(self, num_inputs: int, width: int):
        super().__init__(num_inputs, width, batch_first=True)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        if x.device.type != "cpu":
            with torch.autocast(x.device.type, enabled=False):
                return super().forward(x.float(), state)
        if torch.is_grad_enabled() and torch.is_autocast_enabled("cpu"):
            bias = self.bias_ih_l0 + self.bias_hh_l0
            outputs, c = Unrolled.apply(x, state[0][0], state[1][0], self.weight_ih_l0, self.weight_hh_l0, bias)
            return outputs, (outputs[:, -1][None], c[None])
        return super().forward(x, tuple(part.to(x.dtype) for part in state))


class Unrolled(torch.autograd.Function):
    """The LSTM with products in bfloat16, and cells and gradients of one in float32. No gradient goes to the state it begins with.

        i, f, o = sigmoid(z_i, z_f, z_o),  g = tanh(z_g),  z = x W_x + h W_h + b,   c' = f c + i g,  h' = o tanh(c')

    Everything that does not wait for the step before (or, going back, after) is one product or one pass over all steps.
    """

    @staticmethod
    def forward(ctx, x, h, c, w_x, w_h, bias):
        dtype, (B, L, _), H = torch.bfloat16, x.shape, h.shape[-1]
        with torch.autocast("cpu", enabled=False):
            # tanh(z) = 2 sigmoid(2 z) - 1: with z_g doubled beforehand, one sigmoid serves the four gates.
            double = torch.ones(4, 1, 1)
            double[2] = 2
            w_x, w_h = ((w.view(4, H, -1) * double).view(4 * H, -1).to(dtype) for w in (w_x, w_h))
            inputs = x.transpose(0, 1).to(dtype).reshape(L * B, -1)
            z = F.linear(inputs, w_x, (bias.view(4, H) * double[:, 0]).view(-1).to(dtype)).view(L, B, 4 * H)
            gates = torch.empty(L, B, 4, H)  # i, f, g as sigmoid(2 z_g), o
            cells, squashed = torch.empty(L + 1, B, H), torch.empty(L, B, H)  # c, sigmoid(2 c)
            outputs = torch.empty(L + 1, B, H, dtype=dtype)
            cells[0], outputs[0], w_h_t = c, h, w_h.T
            for t in range(L):
                torch.sigmoid(torch.addmm(z[t], outputs[t], w_h_t).float().view(B, 4, H), out=gates[t])
                i, f, g, o = gates[t].unbind(1)
                c = torch.addcmul(f * cells[t], i, 2 * g - 1, out=cells[t + 1])
                s = torch.sigmoid(2 * c, out=squashed[t])
                outputs[t + 1] = o * (2 * s - 1)
        ctx.save_for_backward(inputs, outputs, cells, squashed, gates, w_x, w_h, double)
        return outputs[1:].transpose(0, 1), cells[-1]

    @staticmethod
    def backward(ctx, d_outputs, d_cell):
        inputs, outputs, cells, squashed, gates, w_x, w_h, double = ctx.saved_tensors
        L, B, _, H = gates.shape
        # Of a step's loss by z: that by c times `by_cell`, of i, f and g; that by h times `by_output`, of o.
        i, f, g, o = gates.unbind(2)
        tanh_c, by_cell = 2 * squashed - 1, torch.empty(L, B, 3, H)
        torch.mul(i * (1 - i), 2 * g - 1, out=by_cell[:, :, 0])
        torch.mul(f * (1 - f), cells[:-1], out=by_cell[:, :, 1])
        torch.mul(g * (1 - g), 2 * i, out=by_cell[:, :, 2])
        by_output = o * (1 - o) * tanh_c
        cell_by_output = o * (1 - tanh_c.square())
        d_z = torch.empty(L, B, 4, H, dtype=inputs.dtype)
        d_c, d_outputs = d_cell, d_outputs.transpose(0, 1).float()
        d_h = d_outputs[-1]
        for t in reversed(range(L)):
            d_c = torch.addcmul(d_c, d_h, cell_by_output[t])
            d_z[t, :, :3] = by_cell[t] * d_c[:, None]
            d_z[t, :, 3] = by_output[t] * d_h
            if t:
                d_h = d_outputs[t - 1] + d_z[t].view(B, 4 * H) @ w_h
                d_c = d_c * f[t]
        d_z = d_z.view(L * B, 4 * H)
        d_x = (d_z @ w_x).view(L, B, -1).transpose(0, 1) if ctx.needs_input_grad[0] else None

        def as_given(d_w):  # by the weights before z_g was doubled
            return (d_w.float().view(4, H, -1) * double).view(d_w.shape)

        d_bias = as_given(d_z.sum(0, dtype=torch.float32)[:, None])[:, 0]
        return d_x, None, None, as_given(d_z.T @ inputs), as_given(d_z.T @ outputs[:-1].reshape(L * B, H)), d_bias
