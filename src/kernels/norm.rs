//! `norm`: RMS norm of rows, with a learned scale before or behind it.
//!
//! `out[r] = rms_norm(rows[r]) * scale * factor`, or `rms_norm(rows[r] * scale) * factor`, f32 [rows, cols].
//! Bounded: the order of the sum of squares and the device's square root are free.

use rayon::prelude::*;

use super::{Arguments, PARAMS, Source, Value, decode_value, input_fragments, read, shader, write};
use crate::error::Result;
use crate::spec::FloatType;

/// See the module.
#[derive(Debug, Clone, PartialEq)]
pub struct Norm {
    /// Rows of a token.
    pub rows_per_token: usize,
    /// Width of a row.
    pub cols: usize,
    /// Type of the rows that enter.
    pub input: FloatType,
    /// Added to the mean square.
    pub eps: f32,
    /// Where the scale vector acts.
    pub scale: NormScale,
    /// Multiplies last.
    pub factor: f32,
}

/// Where the scale vector `[cols]` acts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormScale {
    /// On what is normed.
    Before,
    /// On the normed row.
    After,
}

impl Norm {
    pub(super) fn source(&self) -> Source {
        let Self { rows_per_token, cols, input, eps, scale, factor } = self;
        let mut fragments = vec![shader!("fragments/params.wgsl")];
        fragments.extend(input_fragments(*input));
        fragments.push(match scale {
            NormScale::Before => shader!("fragments/norm_scale_before.wgsl"),
            NormScale::After => shader!("fragments/norm_scale_after.wgsl"),
        });
        fragments.push(shader!("norm/rms.wgsl"));
        Source {
            constants: vec![
                ("ROWS_PER_TOKEN", Value::U32(*rows_per_token as u32)),
                ("COLS", Value::U32(*cols as u32)),
                ("EPS", Value::F32(*eps)),
                ("FACTOR", Value::F32(*factor)),
            ],
            bindings: vec![
                PARAMS,
                read("rows", "array<u32>"),
                read("scale_vector", "array<f32>"),
                write("out", "array<f32>"),
            ],
            fragments,
        }
    }

    pub(super) fn run(&self, arguments: &mut Arguments<'_>) -> Result<()> {
        let rows = arguments.tokens()? * self.rows_per_token;
        let words = arguments.read("rows")?;
        let scale = arguments.read_f32("scale_vector")?;
        let out: &mut [f32] = bytemuck::cast_slice_mut(arguments.write("out")?);
        let out = &mut out[..rows * self.cols];
        out.par_chunks_exact_mut(self.cols).enumerate().for_each(|(row, out)| {
            for (col, out) in out.iter_mut().enumerate() {
                let value = decode_value(words, self.input, row * self.cols + col);
                *out = match self.scale {
                    NormScale::Before => value * scale[col],
                    NormScale::After => value,
                };
            }
            let mean = out.iter().map(|value| value * value).sum::<f32>() / self.cols as f32;
            let norm = 1.0 / (mean + self.eps).sqrt();
            for (col, out) in out.iter_mut().enumerate() {
                *out *= norm;
                match self.scale {
                    NormScale::Before => {}
                    NormScale::After => *out *= scale[col],
                }
                *out *= self.factor;
            }
        });
        Ok(())
    }
}
