//! Ways to drop a field in a schedule: what carries it, and the schedule in which one carrier has lost it.
//!
//! A field acts through steps and through tables. Schedules of two specs that differ in it show which: each step
//! that is another kernel or reads other buffers, each table of the plan's that is not there or holds other words.

use std::collections::{BTreeMap, HashSet};

use crate::error::{Error, Result};
use crate::kernels::pack::PackedMatrix;
use crate::plan;
use crate::schedule::{Buffer, Contents, Schedule, Step, Table};
use crate::weights::MoeWeights;

/// A schedule and what its plan writes into its own buffers.
pub(super) struct Lowered {
    pub schedule: Schedule,
    pub words: Words,
}

/// By name of the buffer.
pub(super) type Words = BTreeMap<String, Vec<u32>>;

impl Lowered {
    /// What `weights` make of `schedule`.
    pub fn new(schedule: Schedule, weights: &MoeWeights<'_>) -> Result<Self> {
        let fill = plan::fill(&weights.router, Some(weights));
        let mut all = Words::new();
        for buffer in schedule.buffers.iter().filter(|buffer| is_owned(buffer.contents)) {
            let mut whole = vec![0u32; buffer.bytes as usize / 4];
            fill(&schedule, buffer, &mut |first, words| {
                whole.iter_mut().skip(first).zip(words).for_each(|(target, word)| *target = *word);
                Ok(())
            })?;
            all.insert(buffer.name.clone(), whole);
        }
        Ok(Self { schedule, words: all })
    }
}

fn is_owned(contents: Contents) -> bool {
    match contents {
        Contents::Segment { matrix: _, segment: _ }
        | Contents::Spans { matrix: _, segment: _ }
        | Contents::Table(_) => true,
        Contents::HiddenStates
        | Contents::TokenIds
        | Contents::Output
        | Contents::ExpertHiddenStates
        | Contents::AdapterIds
        | Contents::Counts
        | Contents::RowWeights
        | Contents::GivenLogits
        | Contents::PreviousRouterStates
        | Contents::RouterStates
        | Contents::SharedWeights
        | Contents::TopkIds
        | Contents::TopkWeights
        | Contents::Scratch
        | Contents::Params => false,
    }
}

/// What a field acts through.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Carrier {
    /// A step of a bucket, by its place.
    Step { bucket: usize, at: usize, name: String },
    /// A buffer of the plan's, by its name.
    Table(String),
}

impl Carrier {
    /// What reports call it.
    pub fn name(&self) -> &str {
        match self {
            Self::Step { bucket: _, at: _, name } | Self::Table(name) => name,
        }
    }

    /// Whether a call that runs `bucket` could tell.
    pub fn acts_in(&self, bucket: usize) -> bool {
        match self {
            Self::Step { bucket: own, at: _, name: _ } => *own == bucket,
            Self::Table(_) => true,
        }
    }
}

/// Everything in which `spec` differs from `neutral`.
pub(super) fn carriers(neutral: &Lowered, spec: &Lowered) -> Vec<Carrier> {
    let mut found = vec![];
    for (bucket, steps) in spec.schedule.buckets.iter().enumerate() {
        for (at, step) in steps.steps.iter().enumerate() {
            let same = counterpart(&neutral.schedule, bucket, step).is_some_and(|other| {
                buffer_names(&neutral.schedule, other) == buffer_names(&spec.schedule, step)
                    && does_the_same(&text(other), &text(step))
            });
            if !same {
                found.push(Carrier::Step { bucket, at, name: step.name.clone() });
            }
        }
    }
    for buffer in &spec.schedule.buffers {
        let carries = match buffer.contents {
            // Where the rows of a matrix lie is no parameter, and follows from what is.
            Contents::Spans { matrix: _, segment: _ } => false,
            contents => is_owned(contents) && spec.words.get(&buffer.name) != neutral.words.get(&buffer.name),
        };
        if carries {
            found.push(Carrier::Table(buffer.name.clone()));
        }
    }
    found
}

fn counterpart<'a>(schedule: &'a Schedule, bucket: usize, step: &Step) -> Option<&'a Step> {
    schedule.buckets.get(bucket)?.steps.iter().find(|other| other.name == step.name)
}

fn buffer_names<'a>(schedule: &'a Schedule, step: &Step) -> Vec<&'a str> {
    step.buffers.iter().map(|&index| schedule.buffers[index].name.as_str()).collect()
}

/// Whether kernels differ in nothing, or only in that `neutral` would take more slots: no row has one of those.
fn does_the_same(neutral: &str, spec: &str) -> bool {
    let (begin, end) = ("const NUM_SLOTS: u32 = ", "u;");
    let bound = |text: &str| -> Option<(usize, String)> {
        let (before, rest) = text.split_once(begin)?;
        let (number, behind) = rest.split_once(end)?;
        Some((number.parse().ok()?, format!("{before}{behind}")))
    };
    match (bound(neutral), bound(spec)) {
        (Some((more, a)), Some((slots, b))) => more >= slots && a == b,
        (None, _) | (_, None) => neutral == spec,
    }
}

/// The step's kernel, as far as its entry point reaches: what lies beside that does nothing.
fn text(step: &Step) -> String {
    let text = step.operation.source().wgsl();
    // Items at the outermost level, each with its own name.
    let mut items: Vec<String> = vec![];
    let (mut item, mut depth) = (String::new(), 0usize);
    for line in text.lines().map(|line| line.split("//").next().unwrap_or("")) {
        for c in line.chars() {
            item.push(c);
            match c {
                '{' | '(' => depth += 1,
                '}' | ')' => depth = depth.saturating_sub(1),
                _ => {}
            }
            if depth == 0 && (c == ';' || c == '}') {
                items.push(std::mem::take(&mut item));
            }
        }
        item.push('\n');
    }
    let words = |text: &str| -> HashSet<String> {
        text.split(|c: char| !(c.is_alphanumeric() || c == '_')).map(str::to_owned).collect()
    };
    let name = |item: &str| -> Option<String> {
        let head = item.split(['=', '{', ';']).next().unwrap_or(item);
        let mut words = head.split(|c: char| !(c.is_alphanumeric() || c == '_')).filter(|word| !word.is_empty());
        words.find(|word| ["fn", "const", "struct", "alias", "var"].contains(word))?;
        words
            .find(|word| !["storage", "read", "read_write", "uniform", "workgroup", "private"].contains(word))
            .map(Into::into)
    };
    let items: Vec<(Option<String>, HashSet<String>, String)> =
        items.into_iter().map(|item| (name(&item), words(&item), item)).collect();
    let mut reached: HashSet<&str> = HashSet::from(["main"]);
    let mut kept = vec![false; items.len()];
    loop {
        let next = items
            .iter()
            .enumerate()
            .find(|(at, (name, _, _))| !kept[*at] && name.as_deref().is_none_or(|name| reached.contains(name)));
        let Some((at, (_, words, _))) = next else { break };
        kept[at] = true;
        reached.extend(words.iter().map(String::as_str));
    }
    let kept = items.iter().zip(kept).filter(|(_, kept)| *kept);
    kept.map(|((_, _, item), _)| item.split_whitespace().collect::<Vec<_>>().join(" ")).collect::<Vec<_>>().join("\n")
}

/// `spec` with one carrier as it is in `neutral`. A step that only `spec` has is left out: what it writes stays
/// poison. A step of `neutral` gets the buffers of these names; those that `spec` has not come along.
pub(super) fn neutralised(neutral: &Lowered, spec: &Lowered, carrier: &Carrier) -> Result<Lowered> {
    let mut words = spec.words.clone();
    let mut schedule = spec.schedule.clone();
    match carrier {
        Carrier::Table(name) => {
            let lacks = || Error::invalid(name.clone(), "no such buffer", "one of the plan's", "a fault of the mutant");
            let buffer = schedule.buffers.iter().find(|buffer| buffer.name == *name).ok_or_else(lacks)?;
            let own = words.get_mut(name).ok_or_else(lacks)?;
            *own = without(neutral, &schedule, buffer, own);
        }
        Carrier::Step { bucket, at, name: _ } => {
            let (bucket, at) = (*bucket, *at);
            let steps = &mut schedule.buckets[bucket].steps;
            match counterpart(&neutral.schedule, bucket, &steps[at]) {
                None => {
                    steps.remove(at);
                }
                Some(other) => {
                    let mut step = other.clone();
                    for index in &mut step.buffers {
                        *index = bring(&neutral.schedule.buffers[*index], &mut schedule.buffers);
                    }
                    schedule.buffers.iter_mut().for_each(make_room);
                    schedule.buckets[bucket].steps[at] = step;
                    for buffer in &schedule.buffers {
                        if let (None, Some(other)) = (words.get(&buffer.name), neutral.words.get(&buffer.name)) {
                            words.insert(buffer.name.clone(), other.clone());
                        }
                    }
                }
            }
        }
    }
    Ok(Lowered { schedule, words })
}

/// How many times as large as a plan asks for its buffers are where a foreign step runs in it: that may read rows of
/// another width, and what it finds there is judged, not how a backend treats the end of a buffer.
pub(super) const ROOM: u64 = 4;

fn make_room(buffer: &mut Buffer) {
    match buffer.contents {
        Contents::Params => {}
        Contents::HiddenStates
        | Contents::TokenIds
        | Contents::Output
        | Contents::ExpertHiddenStates
        | Contents::AdapterIds
        | Contents::Counts
        | Contents::RowWeights
        | Contents::GivenLogits
        | Contents::PreviousRouterStates
        | Contents::RouterStates
        | Contents::SharedWeights
        | Contents::TopkIds
        | Contents::TopkWeights
        | Contents::Scratch
        | Contents::Segment { matrix: _, segment: _ }
        | Contents::Spans { matrix: _, segment: _ }
        | Contents::Table(_) => {
            buffer.bytes *= ROOM;
            buffer.token_bytes = buffer.token_bytes.map(|bytes| bytes * ROOM);
        }
    }
}

/// The words of `buffer` without what `neutral` has not: what `neutral` holds there, then what changes nothing.
fn without(neutral: &Lowered, schedule: &Schedule, buffer: &Buffer, own: &[u32]) -> Vec<u32> {
    let nothing = neutral_word(buffer.contents);
    let held = neutral.words.get(&buffer.name).map_or(&[][..], Vec::as_slice);
    let mut words: Vec<u32> = held.iter().copied().chain(std::iter::repeat(nothing)).take(own.len()).collect();
    if let Contents::Segment { matrix, segment } = buffer.contents {
        let packed = &schedule.matrices[matrix];
        let bare = |matrix: &PackedMatrix| PackedMatrix { bias: false, segments: vec![], ..matrix.clone() };
        let mut others = neutral.schedule.matrices.iter();
        let bias_only = packed.bias && others.any(|other| !other.bias && bare(other) == bare(packed));
        if bias_only {
            words = own.to_vec();
        }
        for span in packed.segments.get(segment).map_or(&[][..], |segment| &segment.spans) {
            // Foreign words are no order of columns.
            let ordered = packed.blocks().is_some_and(|blocks| blocks.act_order);
            let order = if ordered && !bias_only { packed.pair * packed.cols } else { 0 };
            let bias = if bias_only { span.row_end - span.row_begin } else { 0 };
            for (first, count) in [(span.order, order), (span.bias, bias)] {
                words.iter_mut().skip(first).take(count).for_each(|word| *word = 0);
            }
        }
    }
    words
}

/// The index of the buffer that a foreign step means by `wanted`.
fn bring(wanted: &Buffer, buffers: &mut Vec<Buffer>) -> usize {
    match buffers.iter_mut().position(|buffer| buffer.name == wanted.name) {
        Some(index) => {
            buffers[index].bytes = buffers[index].bytes.max(wanted.bytes);
            index
        }
        None => {
            buffers.push(wanted.clone());
            buffers.len() - 1
        }
    }
}

/// What changes nothing: 0 as a bias, a weight, an id or a slot, 1 as a factor.
fn neutral_word(contents: Contents) -> u32 {
    match contents {
        Contents::Table(
            Table::PerExpertScale
            | Table::GlobalScale
            | Table::RouterInputScale
            | Table::RouterStatesScale
            | Table::RouterNorm
            | Table::LatentPreNorm
            | Table::LatentPostNorm
            | Table::LatentReducedNorm
            | Table::OutputNorm
            | Table::ExpertInputScales(_)
            | Table::SharedInputScales(_),
        ) => 1.0f32.to_bits(),
        Contents::Table(Table::ExpertSlots | Table::Tid2eid | Table::SelectionBias | Table::OutputBias)
        | Contents::Segment { matrix: _, segment: _ }
        | Contents::Spans { matrix: _, segment: _ }
        | Contents::HiddenStates
        | Contents::TokenIds
        | Contents::Output
        | Contents::ExpertHiddenStates
        | Contents::AdapterIds
        | Contents::Counts
        | Contents::RowWeights
        | Contents::GivenLogits
        | Contents::PreviousRouterStates
        | Contents::RouterStates
        | Contents::SharedWeights
        | Contents::TopkIds
        | Contents::TopkWeights
        | Contents::Scratch
        | Contents::Params => 0,
    }
}

/// Writes `words` into the buffers of a plan.
pub(super) fn filled(words: &Words) -> impl Fn(&Schedule, &Buffer, plan::Write<'_>) -> Result<()> {
    move |_, buffer, write| match words.get(&buffer.name) {
        Some(words) => write(0, words),
        None => Ok(()),
    }
}
