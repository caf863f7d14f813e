"""The principal components of BOLD of very many parcels, without its (V, V) covariance.

The covariance C is only ever multiplied with blocks of a few vectors, which the caller does in passes over the data.
From a random block of its range, each pass takes one power iteration further, and the components are the best ones of
the space that all blocks span together: the randomised range finder with power iterations (Halko, Martinsson and Tropp
2011, SIAM Review 53, algorithm 4.4) that keeps its blocks (Halko, Martinsson, Shkolnisky and Tygert 2011, SIAM J. Sci.
Comput. 33). Noise has a flat spectrum, whose powers tell its components apart slowly: the last block alone would need
several times as many passes (Musco and Musco 2015, arXiv 1504.05477).
"""

from __future__ import annotations

import torch
from torch import Tensor

OVERSAMPLING = 64
"""How many more vectors than components a block has."""
LEAST_PASSES, MOST_PASSES = 3, 12
"""Products with the covariance: the first refines the random block, each further one is a power iteration more."""
TOLERANCE = 5e-4
"""A pass that adds less than this part of the components' variance is the last: what is left is about as much."""


class ComponentSearch:
    """Finds the directions of largest variance: `while block is not None: block = search.take(C @ block)`.

    It holds all blocks, (V, k) float64 each with k = latent_dim + OVERSAMPLING, and K^T C K for the matrix K of their
    orthonormal columns. With as many columns as parcels the components are the exact ones.

    Args:
        sketch: (V, k) random vectors in the range of the covariance (see `sketch_width`).
        latent_dim: how many components are wanted, at most k.

    Attributes:
        block: (V, at most k) float64, orthonormal columns to multiply with the covariance; None when all is found.
        held: the variance of the components after each pass.
    """

    def __init__(self, sketch: Tensor, latent_dim: int) -> None:
        self.latent_dim = latent_dim
        self.held: list[float] = []
        self._parcels = len(sketch)
        self._blocks: list[Tensor] = []
        self._projected = sketch.new_zeros(0, 0)
        self.block: Tensor | None = self._orthonormal(sketch)

    def take(self, product: Tensor) -> Tensor | None:
        """Take in C @ `block`, of its shape; returns the next block, None when all is found."""
        assert self.block is not None
        self._blocks.append(self.block)
        old = len(self._projected)
        column = torch.cat([block.T @ product for block in self._blocks])
        grown = product.new_zeros(len(column), len(column))
        grown[:old, :old] = self._projected
        grown[:, old:] = column
        grown[old:, :old] = column[:old].T
        grown[old:, old:] = (column[old:] + column[old:].T) / 2
        self._projected = grown
        self.held.append(float(torch.linalg.eigvalsh(grown)[-self.latent_dim :].sum()))
        self.block = None if self._is_found() else self._orthonormal(product[:, : self._parcels - len(grown)])
        return self.block

    @property
    def operations(self) -> int:
        """The order of magnitude of the operations that the next call takes: V x columns^2."""
        columns = len(self._projected) + (0 if self.block is None else self.block.shape[1])
        return self._parcels * columns**2

    def components(self) -> tuple[Tensor, Tensor]:
        """The variances (d,), descending, and the orthonormal directions (d, V) of the components."""
        values, vectors = torch.linalg.eigh(self._projected)
        values, vectors = values.flip(0)[: self.latent_dim], vectors.flip(1)[:, : self.latent_dim]
        parts = vectors.split([block.shape[1] for block in self._blocks])
        basis = vectors.new_zeros(self._parcels, len(values))
        for block, part in zip(self._blocks, parts, strict=True):
            basis += block @ part
        return values, basis.T

    def _is_found(self) -> bool:
        if len(self._projected) == self._parcels:
            return True
        if len(self.held) < LEAST_PASSES:
            return False
        return len(self.held) == MOST_PASSES or self.held[-1] - self.held[-2] <= TOLERANCE * self.held[-1]

    def _orthonormal(self, vectors: Tensor) -> Tensor:
        """Orthonormal columns of the span of (V, k) vectors outside of all blocks.

        Twice, since vectors that lie nearly inside of the blocks lose their digits the first time.
        """
        for _ in range(2):
            for block in self._blocks:
                vectors = vectors - block @ (block.T @ vectors)
            vectors = torch.linalg.qr(vectors).Q
        return vectors


def sketch_width(latent_dim: int, n_parcels: int) -> int:
    """The number of vectors in the first block."""
    return min(latent_dim + OVERSAMPLING, n_parcels)
