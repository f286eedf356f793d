//! `assign`: which matrix each row meets, where that is not its expert's id: i32 `[rows]`.
//!
//! -1 stands for none: the id -1, an expert that is elsewhere, a row that does not exist, a token without adapter.
//! Faults, which make a row NaN, are below: -2 for an expert that is missing and for an adapter that nobody has, -3
//! for any other id. Zero experts follow the slots. Exact.

use super::{Arguments, PARAMS, Source, Value, read, shader, write};
use crate::error::Result;
use crate::spec::replica;

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Assign {
    /// Rows that a token has.
    pub rows_per_token: usize,
    /// Matrices of one kind: slots of experts.
    pub num_slots: usize,
    /// What a row is assigned by.
    pub by: AssignBy,
}

/// What a row is assigned by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AssignBy {
    /// `topk_ids`.
    Expert {
        /// E.
        num_experts: usize,
        /// E plus zero experts.
        selectable: usize,
        /// Where experts are.
        slots: ExpertSlots,
    },
    /// Its place, [slots, capacity], and `counts` `[slots]`.
    Batched {
        /// Rows per slot.
        capacity: usize,
    },
    /// `adapter_ids` of its token and its `row_slots`: adapter * slots + slot.
    Adapter {
        /// Adapters.
        num_adapters: usize,
    },
}

/// Where experts are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExpertSlots {
    /// Slot s has expert `first + s`.
    Range {
        /// The first.
        first: usize,
    },
    /// `expert_slots` [E, replicas].
    Table {
        /// Entries of an expert.
        replicas: usize,
    },
}

impl Assign {
    pub(super) fn source(&self) -> Source {
        let Self { rows_per_token, num_slots, by } = self;
        let mut constants = vec![("NUM_SLOTS", Value::U32(*num_slots as u32))];
        let mut bindings = vec![PARAMS];
        let mut fragments = vec![shader!("fragments/params.wgsl")];
        match *by {
            AssignBy::Expert { num_experts, selectable, slots } => {
                constants.push(("NUM_EXPERTS", Value::U32(num_experts as u32)));
                constants.push(("SELECTABLE", Value::U32(selectable as u32)));
                bindings.push(read("topk_ids", "array<i32>"));
                match slots {
                    ExpertSlots::Range { first } => {
                        constants.push(("FIRST_EXPERT", Value::U32(first as u32)));
                        fragments.push(shader!("fragments/expert_range.wgsl"));
                    }
                    ExpertSlots::Table { replicas } => {
                        constants.push(("REPLICAS", Value::U32(replicas as u32)));
                        bindings.push(read("expert_slots", "array<i32>"));
                        fragments.push(shader!("fragments/expert_table.wgsl"));
                    }
                }
                fragments.push(shader!("fragments/assigned_expert.wgsl"));
            }
            AssignBy::Batched { capacity } => {
                // The counts are as many as the slots.
                constants = vec![("CAPACITY", Value::U32(capacity as u32))];
                bindings.push(read("counts", "array<u32>"));
                fragments.push(shader!("fragments/assigned_batched.wgsl"));
            }
            AssignBy::Adapter { num_adapters } => {
                constants.push(("NUM_ADAPTERS", Value::U32(num_adapters as u32)));
                bindings.extend([read("row_slots", "array<i32>"), read("adapter_ids", "array<i32>")]);
                fragments.push(shader!("fragments/assigned_adapter.wgsl"));
            }
        }
        constants.push(("ROWS_PER_TOKEN", Value::U32(*rows_per_token as u32)));
        bindings.push(write("slots_out", "array<i32>"));
        fragments.push(shader!("assign/rows.wgsl"));
        Source { constants, bindings, fragments }
    }

    pub(super) fn run(&self, arguments: &mut Arguments<'_>) -> Result<()> {
        let rows = arguments.tokens()? * self.rows_per_token;
        let first_token = arguments.first_token()? as usize;
        let num_slots = self.num_slots as i32;
        let out = arguments.write("slots_out")?.iter_mut().take(rows).enumerate();
        match self.by {
            AssignBy::Expert { num_experts, selectable, slots } => {
                let ids = arguments.read_i32("topk_ids")?;
                let table = match slots {
                    ExpertSlots::Range { first: _ } => &[][..],
                    ExpertSlots::Table { replicas: _ } => arguments.read_i32("expert_slots")?,
                };
                let one = |row: usize| match usize::try_from(ids[row]) {
                    Err(_) if ids[row] == -1 => -1,
                    Ok(id) if id < num_experts => match slots {
                        ExpertSlots::Range { first } => {
                            id.checked_sub(first).filter(|slot| *slot < self.num_slots).map_or(-1, |slot| slot as i32)
                        }
                        ExpertSlots::Table { replicas } => {
                            let slot =
                                table[id * replicas + replica(first_token + row / self.rows_per_token, replicas)];
                            if (-2..num_slots).contains(&slot) { slot } else { -3 }
                        }
                    },
                    Ok(id) if id < selectable => num_slots + (id - num_experts) as i32,
                    Ok(_) | Err(_) => -3,
                };
                out.for_each(|(row, slot)| *slot = one(row) as u32);
            }
            AssignBy::Batched { capacity } => {
                let counts = arguments.read("counts")?;
                let one = |row: usize| {
                    let (slot, at) = (row / capacity, row % capacity);
                    if at < counts[slot] as usize { slot as i32 } else { -1 }
                };
                out.for_each(|(row, slot)| *slot = one(first_token + row) as u32);
            }
            AssignBy::Adapter { num_adapters } => {
                let (slots, adapters) = (arguments.read_i32("row_slots")?, arguments.read_i32("adapter_ids")?);
                let one = |row: usize| {
                    let (slot, adapter) = (slots[row], adapters[row / self.rows_per_token]);
                    match usize::try_from(adapter) {
                        _ if !(0..num_slots).contains(&slot) || adapter == -1 => -1,
                        Ok(known) if known < num_adapters => adapter * num_slots + slot,
                        Ok(_) | Err(_) => -2,
                    }
                };
                out.for_each(|(row, slot)| *slot = one(row) as u32);
            }
        }
        Ok(())
    }
}
