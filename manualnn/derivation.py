"""The gradient of softmax and cross-entropy with respect to any model's parameters: as part of a
page, and step by step on a page of its own. Headings begin with #, formulas with $; <L/z> stands
for a partial derivative.
"""

import re
from typing import TYPE_CHECKING

from .markdown import blocks
from .pages import INSIDE, TOP, Block, height_of, new_page, stack

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "The gradient of softmax and cross-entropy"
SHORT = (
    r"""
For **any loss** $L$ of $\hat y = \mathrm{softmax}(f)$, with $f_k(w)$ the logits of **any model**:

$$<L/w> = \sum_i <L/{\hat y_i}> \sum_k \hat y_i\, (\delta_{ik} - \hat y_k)\, <f_k/w>$$

as with $S = \Sigma_m\, e^{f_m}$ the quotient rule gives

$$<{\hat y_i}/f_k> = \dfrac{\delta_{ik}\, e^{f_i} S - e^{f_i} e^{f_k}}{S^2}
= \hat y_i\, (\delta_{ik} - \hat y_k)$$
""",
    r"""
**Cross-entropy** of a target $T$ of sum 1, whose derivative cancels $\hat y_i$:

$$L = -\sum_i T_i \log \hat y_i \qquad <L/{\hat y_i}> = -\dfrac{T_i}{\hat y_i}$$
$$<L/w> = -\sum_k <f_k/w> \sum_i T_i\, (\delta_{ik} - \hat y_k)
= \sum_k (\hat y_k - T_k)\, <f_k/w>$$

With a last layer $f_k = \Sigma_j\, x_j w_{jk} + b_k$, and for $B$ samples:

$$<L/w_{jk}> = (\hat y_k - T_k)\, x_j \quad <L/b_k> = \hat y_k - T_k \quad
<L/W> = X^\top (\hat Y - T) / B$$
""",
)
LONG = r"""
An example $x$ has the class $t$ among $K$; $T_k$ is 1 for $k = t$ and else 0. The logits
$z_k = f_k(w)$ are those of any model with parameters $w$; $\hat y$ are the probabilities, and
$\delta_{ik}$ is 1 for $i = k$ and else 0.

# 1. Any loss of any model

Every probability depends on every logit, so by the chain rule, with the Jacobian of section 2,

$$<L/w> = \sum_i <L/{\hat y_i}> \sum_k <{\hat y_i}/z_k>\, <z_k/w>
= \sum_i <L/{\hat y_i}> \sum_k \hat y_i\, (\delta_{ik} - \hat y_k)\, <f_k/w>$$

# 2. The Jacobian of softmax

$$\hat y_i = \dfrac{e^{z_i}}{S}, \quad S = \sum_m e^{z_m}$$

The quotient rule gives, for $k = i$ and for $k \neq i$,

$$<{\hat y_i}/z_i> = \dfrac{e^{z_i} S - e^{z_i} e^{z_i}}{S^2} = \hat y_i\, (1 - \hat y_i)
\qquad <{\hat y_i}/z_k> = \dfrac{0 - e^{z_i} e^{z_k}}{S^2} = -\,\hat y_i\, \hat y_k$$

and in one formula

$$<{\hat y_i}/z_k> = \hat y_i\, (\delta_{ik} - \hat y_k)$$

# 3. Cross-entropy

$$L = -\sum_i T_i \log \hat y_i \qquad <L/{\hat y_i}> = -\dfrac{T_i}{\hat y_i}$$

The division by $\hat y_i$ cancels, so nothing overflows where it is tiny:

$$<L/w> = -\sum_k <f_k/w> \sum_i T_i\, (\delta_{ik} - \hat y_k)
= \sum_k (\hat y_k - T_k)\, <f_k/w>$$

because exactly one of the $T_i$ is 1. With $w = z_k$ itself this is

$$<L/z_k> = \hat y_k - T_k$$

# 4. The last layer

For $z_k = \Sigma_j\, x_j\, w_{jk} + b_k$ only $z_k$ depends on $w_{jk}$ and on $b_k$, with the
derivatives $x_j$ and 1:

$$<L/w_{jk}> = (\hat y_k - T_k)\, x_j \qquad <L/b_k> = \hat y_k - T_k$$

# 5. A batch

For $B$ examples, the rows of $X$, with $\hat Y$ and $T$ ($B \times K$) and the mean loss:

$$<L/Z> = \dfrac{1}{B}\,(\hat Y - T) \qquad <L/W> = X^\top <L/Z>
\qquad <L/b> = \sum_{n=1}^{B} <L/Z>_n$$

A penalty $\lambda\,|W|^2 / 2$ adds $\lambda\, W$ to the gradient, and $\mu\,|W|_1$ adds
$\mu\, \mathrm{sign}(W)$; biases are exempt.

# 6. In the code

- losses.py, cross_entropy: the gradient of the logits from logits shifted by their maximum.
- layers.py, Linear.backward: dW = x^T dy, db = sum of dy over the batch, dx = dy W^T.
- optimizers.py, Penalty.add: the gradient += l2 * weight + l1 * sign(weight).
"""


def short(size: float = 9) -> list[Block]:
    """The derivation in two columns below a heading."""
    gap = 0.25
    width = (INSIDE - gap) / 2
    columns = [blocks(_partial(text).strip(), size - 0.5, width) for text in SHORT]

    def draw(page: "Figure", left: float, top: float) -> None:
        for i, column in enumerate(columns):
            below = top
            for block in column:
                block.draw(page, left + i * (width + gap), below)
                below += block.height

    head = blocks(f"# {TITLE}", size)
    return [*head, Block(max(map(height_of, columns)) + 0.08, draw)]


def page() -> "Figure":
    """The derivation step by step."""
    made = new_page(TITLE)
    stack(made, TOP + 0.05, blocks(_partial(LONG).strip()))
    return made


def _partial(text: str) -> str:
    """The text with <L/z> written out."""
    return re.sub(r"<(.+?)/(.+?)>", r"\\dfrac{\\partial \1}{\\partial \2}", text)
