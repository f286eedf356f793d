//! `stream`: reads a buffer once and does nothing else: how fast memory can be read at best, which bounds any layer
//! that reads its weights. No step of a layer: benches launch it. Exact.

use rayon::prelude::*;

use super::{Arguments, Source, read, shader, write};
use crate::error::Result;

/// See the module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stream;

impl Stream {
    /// Invocations of a workgroup, each of which leaves a word in `sums`.
    pub const WORKGROUP: usize = 256;

    pub(super) fn source() -> Source {
        Source {
            constants: vec![],
            bindings: vec![read("source", "array<vec4<u32>>"), write("sums", "array<u32>")],
            fragments: vec![shader!("stream/read.wgsl")],
        }
    }

    /// The words are summed in as many parts as `sums` has words. Parts are runs here, so that each thread reads one
    /// stretch of memory; on a device they are strides. The parts of both have the same sum.
    pub(super) fn run(arguments: &mut Arguments<'_>) -> Result<()> {
        let source = arguments.read("source")?;
        let sums = arguments.write("sums")?;
        let run = source.len().div_ceil(sums.len().max(1)).max(1);
        sums.fill(0);
        sums.par_iter_mut().zip(source.par_chunks(run)).for_each(|(sum, words)| {
            *sum = words.iter().fold(0, |sum, word| sum ^ word);
        });
        Ok(())
    }
}
