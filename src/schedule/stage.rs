//! A stage without a layer around it, for a host whose own kernels do the rest. The routing alone is
//! [`Scope::Routing`]; what a layer has besides it, gate and up to what the second GEMM reads, is here: the activation,
//! the quantisation of rows, and both in one step. The kernels and their twins are those of a layer.

use super::{Bucket, Buffer, Contents, DeviceFacts, Extent, Grid, Part, Schedule, Step, quantize_by};
use crate::error::{Error, Result};
use crate::kernels::quantize::{AMAX_PARTS, Amax, Matrices, Quantize, RowScale, ScaleLayout, ValueSource};
use crate::kernels::{Activate, Activated, Operation};
use crate::spec::{
    Activation, ActivationQuant, ActivationScale, ExpertMlp, FloatType, GateUpLayout, Orientation, ScaleSpan,
    WeightFormat,
};
use crate::support::{Scope, refuse};

/// A stage alone: rows in, rows out.
#[derive(Debug, Clone, PartialEq)]
pub struct StageSpec {
    /// What enters, [`Io::hidden_states`](crate::Io): rows [T, cols] as they are, or f32 rows of gate and up, which
    /// alternate (gate of column 0, up of column 0, ...; of an activation without gate [T, cols]). Where routing
    /// weights act, f32 `[T]` in [`Io::topk_weights`](crate::Io).
    pub source: ValueSource,
    /// Columns of a row that leaves.
    pub cols: usize,
    /// What leaves, [`Io::output`](crate::Io): codes u32 [T, ceil(cols / 4)], four to a word, or f32 [T, cols].
    pub codes: Option<Codes>,
    /// T, the type that the roundings of `source` round to.
    pub model: FloatType,
}

/// How rows become codes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Codes {
    /// The rule. One that the checkpoint's scales are part of belongs to an expert, and is refused.
    pub quant: ActivationQuant,
    /// How the scales lie, in the scratch's buffer [`SCALES`]: of groups as is said here, of rows and of a whole call
    /// [`ScaleLayout::RowMajor`], one a row.
    pub layout: ScaleLayout,
}

/// The scratch's buffer of scales.
pub const SCALES: &str = "scales";

/// Most tokens of a call, as of a layer.
const MAX_TOKENS: usize = 1 << 24;

/// The schedule of a stage for calls of up to `max_tokens` rows.
///
/// # Errors
/// A value that breaks a rule, or buffers beyond what the device binds.
pub fn stage(spec: &StageSpec, max_tokens: usize, facts: &DeviceFacts) -> Result<Schedule> {
    let StageSpec { source, cols, codes, model } = *spec;
    if max_tokens == 0 || max_tokens > MAX_TOKENS {
        return Err(Error::invalid("max_tokens", max_tokens, "1 to 2^24", "plan for the largest batch you will run"));
    }
    let quant = codes.map_or(ActivationQuant::None, |codes| codes.quant);
    let (activation, row_bytes, weighted) = match source {
        ValueSource::Rows { input, divisor, weigh } => {
            if divisor != 1 {
                return Err(Error::invalid("source.divisor", divisor, 1, "a row that enters is a row that leaves"));
            }
            if codes.is_none() {
                let remedy = "quantise the rows, or give gate and up";
                return Err(Error::invalid("codes", "None", "codes, for rows that enter as they are", remedy));
            }
            (Activation::Relu2, cols * input.bytes(), weigh.is_some())
        }
        ValueSource::Activated(Activated { activation, gate_up: _, rounding: _, weighted }) => {
            (activation, 4 * cols * if activation.gated() { 2 } else { 1 }, weighted)
        }
    };
    // The rules of a layer's activation, width and quantisation are those of its experts.
    let mlp = ExpertMlp {
        intermediate_size: cols,
        activation,
        gate_up_layout: GateUpLayout::Separate,
        orientation: Orientation::OutIn,
        gate_up_bias: false,
        down_bias: false,
        format: WeightFormat::F32,
        activation_quant: quant,
    };
    mlp.validate("stage")?;

    let mut list = List { facts, max_tokens, buffers: vec![], steps: vec![] };
    list.add("params", Contents::Params, 16, None);
    list.add("rows", Contents::HiddenStates, 0, Some(row_bytes));
    if weighted {
        list.add("topk_weights", Contents::RowWeights, 0, Some(4));
    }
    let one = Extent::Fixed(1);
    match codes {
        None => {
            let ValueSource::Activated(activated) = source else {
                return Err(Error::invalid("source", "rows", "gate and up", "this is a fault of the stage"));
            };
            list.add("out", Contents::Output, 0, Some(4 * cols));
            let x = Extent::PerToken { items: cols, per: 64, limit: 8192 };
            let operation = Operation::Activate(Activate { activated, rows_per_token: 1, cols, model });
            list.step("activation", operation, Grid { x, y: one })?;
        }
        Some(Codes { quant, layout }) => {
            let (code, scale) = match quant {
                ActivationQuant::None => {
                    return Err(Error::invalid("codes.quant", "None", "a quantisation", "leave codes out"));
                }
                ActivationQuant::Static { code: _ } => {
                    let because = "its scales are those of an expert: plan the layer";
                    return Err(refuse(facts.backend, "codes.quant", &quant, because).into());
                }
                ActivationQuant::Dynamic { code, span, rule, scale } => {
                    expect_layout(span, scale, layout, max_tokens)?;
                    (
                        code,
                        match span {
                            ScaleSpan::Group(group) => {
                                if !group.is_multiple_of(4) {
                                    let remedy = "codes are stored four to a word";
                                    return Err(Error::invalid("codes.quant.span", group, "a multiple of 4", remedy));
                                }
                                RowScale::Span { group: Some(group), rule, scale, layout }
                            }
                            ScaleSpan::Token => RowScale::Span { group: None, rule, scale, layout },
                            ScaleSpan::Tensor => {
                                list.add("partial_amax", Contents::Scratch, 4 * AMAX_PARTS, None);
                                let (rows_per_token, matrices) = (1, Matrices::Groups);
                                let amax = Operation::Amax(Amax { source, rows_per_token, cols, matrices, model });
                                list.step("amax", amax, Grid { x: Extent::Fixed(AMAX_PARTS), y: one })?;
                                RowScale::Tensor { rule, scale }
                            }
                        },
                    )
                }
            };
            let quantize = Quantize { source, rows_per_token: 1, cols, code, scale, model, warps: false };
            let [spans, _] = quantize.spans();
            let (quantize, grid) = quantize_by(quantize, facts);
            list.add("codes", Contents::Output, 0, Some(4 * cols.div_ceil(4)));
            list.add(SCALES, Contents::Scratch, 4 * layout.words(max_tokens, spans), None);
            list.step("quantize", Operation::Quantize(quantize), grid)?;
        }
    }
    let List { facts: _, max_tokens: _, buffers, steps } = list;
    Ok(Schedule {
        // All of it: a stage has no routing to leave out.
        scope: Scope::Layer,
        max_tokens,
        chunk_tokens: max_tokens,
        buffers,
        expert_slots: vec![],
        matrices: vec![],
        buckets: vec![Bucket { max_tokens, steps }],
        decisions: vec![],
    })
}

/// Scales of a type and a span have their layouts.
fn expect_layout(span: ScaleSpan, scale: ActivationScale, layout: ScaleLayout, max_tokens: usize) -> Result<()> {
    let groups = match span {
        ScaleSpan::Group(_) => true,
        ScaleSpan::Token | ScaleSpan::Tensor => false,
    };
    let packed = match scale {
        ActivationScale::Ue8m0Packed => true,
        ActivationScale::F32 | ActivationScale::F32CeilPow2 => false,
    };
    let expected = match layout {
        ScaleLayout::RowMajor if !(groups && packed) => return Ok(()),
        ScaleLayout::Packed if groups && packed => return Ok(()),
        ScaleLayout::ColumnMajor { stride } if groups && !packed => {
            if stride >= max_tokens && stride.is_multiple_of(4) {
                return Ok(());
            }
            format!("a stride of at least max_tokens = {max_tokens}, a multiple of 4")
        }
        ScaleLayout::RowMajor | ScaleLayout::Packed | ScaleLayout::ColumnMajor { stride: _ } => {
            let of = if groups && packed {
                "Packed"
            } else if groups {
                "RowMajor or ColumnMajor"
            } else {
                "RowMajor"
            };
            format!("{of} for {scale:?} scales of {span:?}")
        }
    };
    Err(Error::invalid("codes.layout", format!("{layout:?}"), expected, "correct the layout"))
}

struct List<'a> {
    facts: &'a DeviceFacts,
    max_tokens: usize,
    buffers: Vec<Buffer>,
    steps: Vec<Step>,
}

impl List<'_> {
    /// A buffer of so many bytes, or of so many a row.
    fn add(&mut self, name: &str, contents: Contents, bytes: usize, row_bytes: Option<usize>) {
        let bytes = row_bytes.map_or(bytes, |bytes| (bytes * self.max_tokens).next_multiple_of(4)) as u64;
        let token_bytes = row_bytes.map(|bytes| bytes as u64);
        self.buffers.push(Buffer { name: name.into(), contents, bytes, token_bytes });
    }

    fn step(&mut self, name: &str, operation: Operation, grid: Grid) -> Result<()> {
        let DeviceFacts { backend, max_binding_bytes, max_workgroups, exact_halves: _, matrix_units: _ } = *self.facts;
        let mut buffers = vec![];
        for binding in operation.source().bindings {
            let at = self.buffers.iter().position(|buffer| buffer.name == binding.name);
            let at = at.ok_or_else(|| {
                Error::invalid(binding.name, "no buffer", "one of the stage", "this is a fault of the stage")
            })?;
            let bytes = self.buffers[at].bytes;
            if bytes > max_binding_bytes {
                let because = format!("{} needs {bytes} bytes, a binding holds {max_binding_bytes}", binding.name);
                return Err(refuse(backend, "max_tokens", &self.max_tokens, because).into());
            }
            buffers.push(at);
        }
        let most = grid.workgroups(self.max_tokens).into_iter().max().unwrap_or(0);
        if most > max_workgroups {
            let because = format!("step {name} needs {most} workgroups, a grid has {max_workgroups}");
            return Err(refuse(backend, "cols", &most, because).into());
        }
        self.steps.push(Step { name: name.into(), part: Part::Experts, operation, buffers, grid });
        Ok(())
    }
}
