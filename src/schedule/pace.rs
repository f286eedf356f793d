//! How long a step may take on a device, roughly and rather too long: what cuts a call into submissions.

use std::time::Duration;

use super::{Contents, Extent, Schedule, Step};
use crate::kernels::{GroupedGemm, Operation, Permute, RowSource};

/// What the kernels get out of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rates {
    /// Bytes that a kernel reads in a second.
    pub read_bytes_per_s: u64,
    /// Additions and multiplications in a second: of the GEMMs, which are far from what a data sheet says.
    pub flops_per_s: u64,
}

impl Rates {
    /// Chosen low for the GPU of a desktop, where memory alone gives 20 GB/s and more; not measured. A faster device gets
    /// finer slices than it needs, which costs some submissions. Drivers that compute on the CPU are slower than this:
    /// `moewe doctor` measures both (`bandwidth`, `arithmetic`).
    pub const CONSERVATIVE: Self = Self { read_bytes_per_s: 10_000_000_000, flops_per_s: 20_000_000_000 };
}

/// How long one submission may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pace {
    /// At most so long, by the estimate.
    pub longest: Duration,
    /// What the estimate relies on.
    pub rates: Rates,
}

impl Pace {
    /// A tenth of a second at rates chosen low. Drivers of desktops give up a submission after two seconds: a device may be
    /// twenty times as slow as [`Rates::CONSERVATIVE`] says.
    pub const DESKTOP: Self = Self { longest: Duration::from_millis(100), rates: Rates::CONSERVATIVE };
}

/// What a step reads, writes and computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Work {
    /// Bytes read and written.
    pub bytes: u64,
    /// Additions and multiplications, and what else takes as long.
    pub flops: u64,
}

impl Work {
    /// As if nothing were done while memory is read.
    pub fn time(self, rates: Rates) -> Duration {
        let share = |count: u64, rate: u64| count as f64 / rate as f64;
        let seconds = share(self.bytes, rates.read_bytes_per_s) + share(self.flops, rates.flops_per_s);
        Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
    }
}

/// Operations that a code takes until it is a number, whatever its format.
const DECODING: u64 = 8;
/// Operations of a kernel that is no GEMM, for each word that it reads or writes: roundings, exponentials.
const BY_WORD: u64 = 16;

impl Schedule {
    /// What a step of a chunk of `tokens` tokens comes to at worst: every tile reads its weights from memory, and all
    /// rows meet matrices of this step's segment.
    pub fn work(&self, step: &Step, tokens: usize) -> Work {
        let share = |&index: &usize| {
            let buffer = &self.buffers[index];
            match (buffer.token_bytes, buffer.contents) {
                (_, Contents::Segment { matrix: _, segment: _ }) => 0,
                (Some(bytes), _) => bytes * tokens as u64,
                // Rows of a chunk, or a few words.
                (None, Contents::Scratch) => (buffer.bytes * tokens as u64).div_ceil(self.chunk_tokens.max(1) as u64),
                (None, _) => buffer.bytes,
            }
        };
        let bytes = step.buffers.iter().map(share).sum();
        match &step.operation {
            Operation::GroupedGemm(gemm) => {
                let held = step.buffers.iter().find_map(|index| match self.buffers[*index].contents {
                    Contents::Segment { matrix, segment } => Some((matrix, segment)),
                    _ => None,
                });
                let [visits, rows] = visits(gemm, tokens);
                let Some((matrix, segment)) = held else { return Work { bytes, flops: 0 } };
                let matrix = &self.matrices[matrix];
                let (mut most, mut all) = (0, 0);
                for span in &matrix.segments[segment].spans {
                    let rows = (span.row_end - span.row_begin) as u64;
                    (most, all) = (rows.max(most), all + rows);
                }
                let row_bytes = (4 * matrix.segments[segment].words as u64).div_ceil(all.max(1));
                let weights = visits * most * matrix.cols as u64;
                Work { bytes: bytes + visits * most * row_bytes, flops: weights * (DECODING + 2 * rows) }
            }
            // Each output's rank is a count over all outputs.
            Operation::TopkRouting(kernel) => {
                let outputs = kernel.router_outputs as u64;
                Work { bytes, flops: tokens as u64 * outputs * (outputs + BY_WORD) }
            }
            // Each slot's workgroup reads the slots of all rows.
            Operation::Permute(kernel) => {
                let read = 4 * (tokens * kernel.top_k * kernel.num_slots) as u64;
                Work { bytes: bytes + read, flops: BY_WORD * read / 4 }
            }
            Operation::Norm(_)
            | Operation::Assign(_)
            | Operation::Activate(_)
            | Operation::Quantize(_)
            | Operation::Amax(_)
            | Operation::Diagnose(_)
            | Operation::Combine(_)
            | Operation::Synthesize(_)
            | Operation::Stream(_) => Work { bytes, flops: BY_WORD * bytes / 4 },
        }
    }

    /// The longest that one dispatch of a call may take.
    pub fn longest_step(&self, rates: Rates) -> Duration {
        let of = |(bucket, step)| self.work(step, usize::min(bucket, self.chunk_tokens)).time(rates);
        let steps = self.buckets.iter().flat_map(|bucket| bucket.steps.iter().map(|step| (bucket.max_tokens, step)));
        steps.map(of).max().unwrap_or(Duration::ZERO)
    }
}

/// How often a GEMM reads a matrix at most, and for how many rows each time.
fn visits(gemm: &GroupedGemm, tokens: usize) -> [u64; 2] {
    let [visits, rows] = match (gemm.variant.tile_rows(), gemm.rows) {
        (None, RowSource::Direct { groups }) => [tokens * groups, 1],
        (None, RowSource::Routed { top_k, num_slots: _ }) => [tokens * top_k, 1],
        (Some(rows), RowSource::Direct { groups }) => {
            [Extent::GroupTiles { groups, rows }.workgroups(tokens) as usize, rows]
        }
        (Some(tile_rows), RowSource::Routed { top_k, num_slots }) => [
            Permute { num_slots, top_k, tile_rows, full_tiles: false, warps: false }.max_tiles(tokens * top_k),
            tile_rows,
        ],
    };
    [visits as u64, rows as u64]
}
