//! `activation`: gate and up, which alternate in f32 rows, to f32 rows of what the second GEMM reads, where that is
//! needed unquantised and no GEMM's epilogue computes it: beside adapters. Bounded by the device's `exp`.

use rayon::prelude::*;

use super::grouped_gemm::Activated;
use super::quantize::ValueSource;
use super::{Arguments, Source, shader, unique, write};
use crate::error::Result;
use crate::spec::FloatType;

/// See the module.
#[derive(Debug, Clone, PartialEq)]
pub struct Activate {
    /// Which function.
    pub activated: Activated,
    /// Rows that a token has.
    pub rows_per_token: usize,
    /// Columns of a result.
    pub cols: usize,
    /// T, where anything is rounded.
    pub model: FloatType,
}

impl Activate {
    pub(super) fn source(&self) -> Source {
        let Self { activated, rows_per_token, cols, model } = self;
        let Source { constants, mut bindings, mut fragments } =
            ValueSource::Activated(*activated).source(*rows_per_token, *cols, *model);
        bindings.push(write("out", "array<f32>"));
        fragments.push(shader!("activation/rows.wgsl"));
        Source { constants, bindings, fragments: unique(fragments) }
    }

    pub(super) fn run(&self, arguments: &mut Arguments<'_>) -> Result<()> {
        let rows = arguments.tokens()? * self.rows_per_token;
        let source = ValueSource::Activated(self.activated);
        let (words, weights) = (arguments.read("rows")?, source.weights(arguments)?);
        let out: &mut [f32] = bytemuck::cast_slice_mut(arguments.write("out")?);
        out[..rows * self.cols].par_chunks_exact_mut(self.cols).enumerate().for_each(|(row, out)| {
            let at = |col| source.value(words, weights, [row, col], self.cols, self.model);
            out.iter_mut().enumerate().for_each(|(col, out)| *out = at(col));
        });
        Ok(())
    }
}
