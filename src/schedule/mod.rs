//! What runs, as plain data: `lower` turns a spec and a device's facts into a [`Schedule`].
//!
//! Pure: it alone picks kernels, variants and tiles, and it alone refuses. Printable with `{:#?}`.

use std::borrow::Cow;

use crate::kernels::grouped_gemm::TILE_ROWS;
use crate::kernels::pack::PackedMatrix;
use crate::kernels::quantize::QUANTIZE_WARPS;
use crate::kernels::{Operation, Permute, Quantize};
use crate::support::Scope;

mod lower;
mod pace;
mod stage;
pub mod tuning;

pub use lower::lower;
pub use pace::{Pace, Rates, Work};
pub use stage::{Codes, SCALES, StageSpec, stage};

/// What `lower` knows of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceFacts {
    /// Name of the backend, for refusals.
    pub backend: &'static str,
    /// Largest storage binding in bytes.
    pub max_binding_bytes: u64,
    /// Largest number of workgroups in one dimension.
    pub max_workgroups: u32,
    /// Whether the device has proved that it unpacks each binary16 exactly, subnormals and NaN included: what WGSL
    /// leaves to it.
    pub exact_halves: bool,
    /// Its matrix units.
    pub matrix_units: Units,
}

/// Matrix units of a device, as its kernels can use them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Units {
    /// None.
    None,
    /// Those of a warp, which multiply tiles of 16 x 8 x 16: CUDA.
    Warps,
    /// Besides, those of four warps, which multiply 64 matrix rows by up to 256 rows: compute capability 9.0.
    Warpgroups {
        /// Multiprocessors that have them.
        multiprocessors: usize,
    },
}

/// How a device quantises, and by how many blocks or workgroups.
fn quantize_by(mut quantize: Quantize, facts: &DeviceFacts) -> (Quantize, Grid) {
    let [spans, per_workgroup] = quantize.spans();
    quantize.warps = facts.matrix_units != Units::None && quantize.fits_warps();
    let limit = facts.max_workgroups as usize;
    let grid = match quantize.warps {
        true => {
            let items = quantize.rows_per_token * spans;
            Grid {
                x: Extent::PerToken { items, per: QUANTIZE_WARPS, limit: limit.min(QUANTIZE_BLOCKS) },
                y: Extent::Fixed(1),
            }
        }
        false => {
            let y = Extent::PerToken { items: quantize.rows_per_token, per: 1, limit };
            Grid { x: Extent::Fixed(spans.div_ceil(per_workgroup)), y }
        }
    };
    (quantize, grid)
}

/// What the caller chooses. Changes no result beyond the order of sums.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Bound on one weight buffer, if below the device's.
    pub segment_bytes: Option<u64>,
    /// How the GEMMs of each call are cut.
    pub cuts: Cuts,
    /// Whether an activation and the quantisation behind it are one step where that means the same.
    pub fuse_quantization: bool,
    /// Whether steps that count what explains accuracy are planned; see [`Diagnostics`]. They change no result.
    pub diagnostics: bool,
    /// How long one dispatch may take: tokens pass in chunks so small that none takes longer, as far as 128 tokens do
    /// not. A call whose rows share one scale is not cut.
    pub pace: Option<Pace>,
}

impl Options {
    /// The library's own choice.
    pub const AUTO: Self =
        Self { segment_bytes: None, cuts: Cuts::ByMeanRows, fuse_quantization: true, diagnostics: false, pace: None };
}

/// Which calls have which [`Cut`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cuts {
    /// By how many rows a matrix has in the mean ([`Cut::most_mean_rows`]).
    ByMeanRows,
    /// Each of [`Cut::ALL`] but the last in calls of up to so many tokens that none before it serves.
    UpTo([usize; 5]),
    /// Each of [`Cut::ALL`] but the last up to so many sixteenths of a row of a matrix in the mean, `u32::MAX` for any:
    /// what [`tuning::Tuning::cuts`] found.
    UpToMeanRows([u32; 5]),
}

impl Cuts {
    /// One in every call. What it cannot launch is left to tiles.
    pub const fn only(cut: Cut) -> Self {
        match cut {
            Cut::Gemv => Self::UpTo([usize::MAX, 0, 0, 0, 0]),
            Cut::Pairs => Self::UpTo([0, usize::MAX, 0, 0, 0]),
            Cut::Quads => Self::UpTo([0, 0, usize::MAX, 0, 0]),
            Cut::Octets => Self::UpTo([0, 0, 0, usize::MAX, 0]),
            Cut::Tiles => Self::UpTo([0, 0, 0, 0, usize::MAX]),
            Cut::FullTiles => Self::UpTo([0; 5]),
        }
    }
}

/// Most blocks that quantise: what a large device holds at once, as a launch costs more than another turn.
const QUANTIZE_BLOCKS: usize = 2048;

/// How many rows meet a weight that is read and decoded once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// One.
    Gemv,
    /// Two; eight on matrix units of warps, sixteen on those of warpgroups.
    Pairs,
    /// Four; sixteen, thirty-two.
    Quads,
    /// Eight; thirty-two, sixty-four.
    Octets,
    /// Sixty-four, from a tile in workgroup memory or on matrix units of warps; 160 on those of warpgroups.
    Tiles,
    /// As many; but on matrix units of warpgroups 128 of codes, where they fill their tiles.
    FullTiles,
}

impl Cut {
    /// Every one, from few rows to many.
    pub const ALL: [Self; 6] = [Self::Gemv, Self::Pairs, Self::Quads, Self::Octets, Self::Tiles, Self::FullTiles];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Gemv => "gemv",
            Self::Pairs => "pairs",
            Self::Quads => "quads",
            Self::Octets => "octets",
            Self::Tiles => "tiles",
            Self::FullTiles => "full tiles",
        }
    }

    /// Rows of a matrix, in the mean over all matrices, up to which it is chosen: beyond, what its tiles leave out
    /// costs more than what larger ones would compute for nothing. Measured on an H100 (benches/NOTES.md).
    pub fn most_mean_rows(self, units: Units) -> f64 {
        match (self, units) {
            (Self::Gemv, Units::None) => 0.5,
            (Self::Pairs, Units::None) => 2.0,
            (Self::Quads, Units::None) => 8.0,
            (Self::Octets, Units::None) => 48.0,
            // Calls of few tokens alone; see `lower`.
            (Self::Gemv, Units::Warps | Units::Warpgroups { multiprocessors: _ }) => 0.0,
            (Self::Pairs, Units::Warps) => 5.0,
            (Self::Quads, Units::Warps) => 18.0,
            (Self::Octets, Units::Warps) => 28.0,
            (Self::Pairs, Units::Warpgroups { multiprocessors: _ }) => 6.0,
            (Self::Quads, Units::Warpgroups { multiprocessors: _ }) => 16.0,
            (Self::Octets, Units::Warpgroups { multiprocessors: _ }) => 40.0,
            (Self::Tiles, Units::Warpgroups { multiprocessors: _ }) => 176.0,
            (Self::Tiles | Self::FullTiles, _) => f64::INFINITY,
        }
    }

    /// Most rows of a tile.
    pub fn tile_rows(self, units: Units) -> usize {
        match (self, units) {
            (Self::Gemv, _) => 1,
            (Self::Pairs, Units::None) => 2,
            (Self::Quads, Units::None) => 4,
            (Self::Octets, Units::None) | (Self::Pairs, Units::Warps) => 8,
            (Self::Quads, Units::Warps) | (Self::Pairs, Units::Warpgroups { multiprocessors: _ }) => 16,
            (Self::Octets, Units::Warps) | (Self::Quads, Units::Warpgroups { multiprocessors: _ }) => 32,
            (Self::Tiles | Self::FullTiles, Units::None | Units::Warps) => TILE_ROWS,
            (Self::Octets, Units::Warpgroups { multiprocessors: _ }) => 64,
            (Self::Tiles | Self::FullTiles, Units::Warpgroups { multiprocessors: _ }) => 160,
        }
    }
}

/// The kernels, constants, buffers and grids of a layer.
#[derive(Debug, Clone, PartialEq)]
pub struct Schedule {
    /// What it covers.
    pub scope: Scope,
    /// Most tokens of one call.
    pub max_tokens: usize,
    /// Tokens that pass at once; more are cut into chunks of this size.
    pub chunk_tokens: usize,
    /// Every buffer.
    pub buffers: Vec<Buffer>,
    /// What [`Table::ExpertSlots`] holds.
    pub expert_slots: Vec<i32>,
    /// The packed weights.
    pub matrices: Vec<PackedMatrix>,
    /// Variants by number of tokens, ascending; the last takes all.
    pub buckets: Vec<Bucket>,
    /// What `lower` chose where it had a choice of equal meaning, and the condition that decided.
    pub decisions: Vec<Decision>,
}

/// The buffer of counters, which is scratch.
pub const DIAGNOSTICS: &str = "diagnostics";

/// What one call counted, over all its tokens; [`Schedule::diagnostics`] reads it from the buffer [`DIAGNOSTICS`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Diagnostics {
    /// Logits that are NaN or infinite.
    pub non_finite_logits: u32,
    /// Of the routed experts.
    pub experts: MlpDiagnostics,
    /// Of the shared experts.
    pub shared: MlpDiagnostics,
    /// Values of the output that overflowed its type: that are infinite.
    pub infinite_outputs: u32,
    /// Rows of each expert; with a batched entry of each slot.
    pub load: Vec<u32>,
}

/// Counts of the routed or the shared experts; 0 for what the spec has not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MlpDiagnostics {
    /// Values of gate that the limit changed.
    pub clamped_gate: u32,
    /// Values of up that it changed.
    pub clamped_up: u32,
    /// Codes of the rows that enter, at the end of their range: with a dynamic scale the largest of each span is.
    pub saturated_input: u32,
    /// Likewise of what the second GEMM reads.
    pub saturated_hidden: u32,
}

/// The buffer u32 `[E]`, scratch, in which each call of a layer with [`Placement::Map`](crate::spec::Placement) counts
/// the rows that chose each expert and missed it: their tokens are NaN until it is here.
pub const EXPERT_MISSES: &str = "expert_misses";

/// Counters before those of the load.
pub(crate) const LOAD_SLOT: usize = 10;

/// A choice between ways that mean the same.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    /// The step that it is about.
    pub step: &'static str,
    /// What was chosen.
    pub choice: &'static str,
    /// The condition that decided.
    pub because: Cow<'static, str>,
}

/// One buffer of a schedule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Buffer {
    /// By content.
    pub name: String,
    /// What it holds and who fills it.
    pub contents: Contents,
    /// Size: for `max_tokens` if it holds rows of all tokens, for one chunk if it is scratch. Whole words.
    pub bytes: u64,
    /// Bytes of one token, if it holds rows of all tokens and is cut into chunks.
    pub token_bytes: Option<u64>,
}

/// What a buffer holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Contents {
    /// Caller: [T, H].
    HiddenStates,
    /// Caller: u32 `[T]`.
    TokenIds,
    /// Caller: [T, H].
    Output,
    /// Caller: [T, H], if the experts read another input.
    ExpertHiddenStates,
    /// Caller: i32 `[T]`, -1 for none, if there are adapters.
    AdapterIds,
    /// Caller: u32 `[slots]`, rows of each slot of a batched entry.
    Counts,
    /// Caller: f32 `[T]`, weights of a batched entry that act inside of the experts.
    RowWeights,
    /// Caller: f32 [T, outputs], if the router's logits are given.
    GivenLogits,
    /// Caller: f32 [T, S], the router's state of the previous layer.
    PreviousRouterStates,
    /// Scratch or caller: f32 [T, S], the router's state for the next layer.
    RouterStates,
    /// Scratch or caller: f32 [T, n], the shares of joint normalisation.
    SharedWeights,
    /// Scratch or caller: i32 [T, k].
    TopkIds,
    /// Scratch or caller: f32 [T, k].
    TopkWeights,
    /// Between two steps, for one chunk.
    Scratch,
    /// Number of tokens; one for each chunk.
    Params,
    /// Packed weights.
    Segment {
        /// Index into [`Schedule::matrices`].
        matrix: usize,
        /// Index into its segments.
        segment: usize,
    },
    /// Span table of a segment.
    Spans {
        /// Index into [`Schedule::matrices`].
        matrix: usize,
        /// Index into its segments.
        segment: usize,
    },
    /// A small table of the plan's.
    Table(Table),
}

/// A table that stays as the weights have it; f32 but for the first two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Table {
    /// i32 [E, replicas], of [`Placement::Map`](crate::spec::Placement); the caller may give another.
    ExpertSlots,
    /// i32 [`vocab_size`, k].
    Tid2eid,
    /// `[selectable]`.
    SelectionBias,
    /// `[E]`.
    PerExpertScale,
    /// `[1]`.
    GlobalScale,
    /// `[H]`.
    RouterInputScale,
    /// `[S]`.
    RouterStatesScale,
    /// `[S]`.
    RouterNorm,
    /// `[L]`: behind the norm before the experts.
    LatentPreNorm,
    /// `[L]`: before the norm after each expert.
    LatentPostNorm,
    /// `[L]`: behind the norm of the reduced sum.
    LatentReducedNorm,
    /// `[H]`.
    OutputBias,
    /// `[H]`.
    OutputNorm,
    /// `[E]`: static scales of what enters a GEMM of the routed experts.
    ExpertInputScales(Gemms),
    /// `[n]`: likewise of the shared experts.
    SharedInputScales(Gemms),
}

/// One of an MLP's two GEMMs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gemms {
    /// The first.
    GateUp,
    /// The second.
    Down,
}

/// The steps for up to so many tokens.
#[derive(Debug, Clone, PartialEq)]
pub struct Bucket {
    /// Most tokens (of a chunk) it is chosen for.
    pub max_tokens: usize,
    /// In order.
    pub steps: Vec<Step>,
}

/// Which half of the layer a step belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// Up to ids and weights.
    Routing,
    /// Everything that reads them.
    Experts,
}

/// One dispatch.
#[derive(Debug, Clone, PartialEq)]
pub struct Step {
    /// What it computes, in the layer's words.
    pub name: String,
    /// Its half.
    pub part: Part,
    /// The kernel.
    pub operation: Operation,
    /// A buffer for each binding: indices into [`Schedule::buffers`].
    pub buffers: Vec<usize>,
    /// Workgroups.
    pub grid: Grid,
}

/// Workgroups of a step, as a formula over tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grid {
    /// First dimension.
    pub x: Extent,
    /// Second dimension.
    pub y: Extent,
}

/// Workgroups in one dimension.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extent {
    /// So many.
    Fixed(usize),
    /// `ceil(tokens * items / per)`, at most `limit`: the kernel strides.
    PerToken {
        /// Items of a token.
        items: usize,
        /// Items of a workgroup.
        per: usize,
        /// Bound.
        limit: usize,
    },
    /// Tiles of one group's tokens, of at most so many rows, for so many groups.
    GroupTiles {
        /// Groups.
        groups: usize,
        /// Rows of a tile.
        rows: usize,
    },
    /// Bound on the tiles that a permutation of the rows can make.
    Tiles(Permute),
}

impl Extent {
    /// Workgroups for `tokens`.
    pub fn workgroups(self, tokens: usize) -> u32 {
        let count = match self {
            Self::Fixed(count) => count,
            Self::PerToken { items, per, limit } => (tokens * items).div_ceil(per).min(limit),
            Self::GroupTiles { groups, rows } => groups * tokens.div_ceil(rows),
            Self::Tiles(permute) => permute.max_tiles(tokens * permute.top_k),
        };
        // `lower` has checked each extent at `chunk_tokens` against the device's limit.
        u32::try_from(count).unwrap_or(u32::MAX)
    }
}

impl Grid {
    /// Workgroups for `tokens`; no work if any is 0.
    pub fn workgroups(self, tokens: usize) -> [u32; 3] {
        [self.x.workgroups(tokens), self.y.workgroups(tokens), 1]
    }
}

impl Schedule {
    /// Bytes of packed weights and tables on the device.
    pub fn weight_bytes(&self) -> u64 {
        let table = |buffer: &&Buffer| match buffer.contents {
            Contents::Segment { matrix: _, segment: _ }
            | Contents::Spans { matrix: _, segment: _ }
            | Contents::Table(_) => true,
            Contents::HiddenStates
            | Contents::TokenIds
            | Contents::ExpertHiddenStates
            | Contents::AdapterIds
            | Contents::Counts
            | Contents::RowWeights
            | Contents::GivenLogits
            | Contents::PreviousRouterStates
            | Contents::RouterStates
            | Contents::SharedWeights
            | Contents::Output
            | Contents::TopkIds
            | Contents::TopkWeights
            | Contents::Scratch
            | Contents::Params => false,
        };
        self.buffers.iter().filter(table).map(|buffer| buffer.bytes).sum()
    }

    /// Bytes of scratch.
    pub fn scratch_bytes(&self) -> u64 {
        self.buffers.iter().filter(|buffer| buffer.contents.is_scratch()).map(|buffer| buffer.bytes).sum()
    }

    /// The counters, from the words of the buffer [`DIAGNOSTICS`]; `None` if the words are no such buffer.
    pub fn diagnostics(words: &[u32]) -> Option<Diagnostics> {
        let (counters, load) = words.split_at_checked(LOAD_SLOT)?;
        let mlp = |first: usize| MlpDiagnostics {
            clamped_gate: counters[first],
            clamped_up: counters[first + 1],
            saturated_input: counters[first + 2],
            saturated_hidden: counters[first + 3],
        };
        Some(Diagnostics {
            non_finite_logits: counters[0],
            infinite_outputs: counters[1],
            experts: mlp(2),
            shared: mlp(6),
            load: load.to_vec(),
        })
    }

    /// The bucket for a chunk of `tokens`.
    pub fn bucket(&self, tokens: usize) -> usize {
        self.buckets.iter().position(|bucket| tokens <= bucket.max_tokens).unwrap_or(self.buckets.len() - 1)
    }
}

impl Contents {
    /// Whether [`Scratch`](crate::Scratch) holds it (unless the caller gives it).
    pub fn is_scratch(self) -> bool {
        match self {
            Self::TopkIds | Self::TopkWeights | Self::RouterStates | Self::SharedWeights | Self::Scratch => true,
            Self::HiddenStates
            | Self::TokenIds
            | Self::ExpertHiddenStates
            | Self::AdapterIds
            | Self::Counts
            | Self::RowWeights
            | Self::GivenLogits
            | Self::PreviousRouterStates
            | Self::Output
            | Self::Params
            | Self::Segment { matrix: _, segment: _ }
            | Self::Spans { matrix: _, segment: _ }
            | Self::Table(_) => false,
        }
    }
}
