//! Hidden states to ids and weights.

use super::*;

impl Lowering<'_> {
    /// Hidden states to ids and weights.
    pub(super) fn routing(&mut self, hidden_states: Rows) -> Result<RoutedBuffers> {
        let part = Part::Routing;
        let MoeSpec {
            hidden_size,
            num_experts,
            top_k,
            router,
            routing,
            experts: _,
            shared: _,
            latent: _,
            lora: _,
            expert_input: _,
            output_bias: _,
            output_norm: _,
            placement: _,
            shard: _,
            common_terms: _,
            entry: _,
            precision,
        } = self.spec;
        let (hidden_size, top_k, outputs) = (*hidden_size, *top_k, self.spec.router_outputs());
        let topk_ids = self.token_buffer("topk_ids", Contents::TopkIds, top_k * 4);
        let topk_weights = self.token_buffer("topk_weights", Contents::TopkWeights, top_k * 4);
        let (logits, transform) = match *router {
            Router::Linear { input, format, bias, transform } => {
                let rows = match input {
                    RouterInput::Hidden => hidden_states,
                    RouterInput::RmsNormScaled { eps } => {
                        let scale = self.table("router_input_scale", Table::RouterInputScale, hidden_size);
                        let out = self.scratch("router_input", hidden_size);
                        let norm = Norm {
                            rows_per_token: 1,
                            cols: hidden_size,
                            input: self.spec.precision.input,
                            eps,
                            scale: NormScale::After,
                            factor: 1.0 / (hidden_size as f32).sqrt(),
                        };
                        self.norm("router_norm", part, norm, hidden_states.buffer, scale, out)?;
                        Rows::floats(out, FloatType::F32)
                    }
                };
                let logits = self.scratch("logits", outputs);
                let shape = [outputs, hidden_size];
                self.project("router_gemm", part, rows, shape, format, bias, Epilogue::Sums, logits, vec![])?;
                (logits, transform)
            }
            Router::Mlp { state_size, rms_norm_eps, previous_state, format } => {
                let logits = self.router_mlp(hidden_states, state_size, rms_norm_eps, previous_state, format)?;
                (logits, LogitTransform::None)
            }
            Router::Given { transform } => {
                (self.token_buffer("given_logits", Contents::GivenLogits, outputs * 4), transform)
            }
        };
        let Routing {
            method,
            renormalize,
            routed_scaling_factor,
            apply_routed_scale_to_output,
            per_expert_scale,
            weight_position: _,
            zero_experts,
            nan_policy,
        } = routing;
        let mut buffers = vec![("logits", logits), ("topk_ids", topk_ids), ("topk_weights", topk_weights)];
        if self.spec.has_selection_bias() {
            let words = self.spec.selectable();
            buffers.push(("selection_bias", self.table("selection_bias", Table::SelectionBias, words)));
        }
        if *per_expert_scale {
            buffers.push(("per_expert_scale", self.table("per_expert_scale", Table::PerExpertScale, *num_experts)));
        }
        let mut shared_weights = None;
        match *method {
            RoutingMethod::Hash { score: _, vocab_size } => {
                buffers.push(("token_ids", self.token_buffer("token_ids", Contents::TokenIds, 4)));
                buffers.push(("tid2eid", self.table("tid2eid", Table::Tid2eid, vocab_size * top_k)));
            }
            RoutingMethod::JointNorm { num_shared, global_scale } => {
                let shares = self.token_buffer("shared_weights", Contents::SharedWeights, num_shared * 4);
                shared_weights = Some(shares);
                buffers.push(("shared_weights", shares));
                if global_scale {
                    buffers.push(("global_scales", self.table("global_scale", Table::GlobalScale, 1)));
                }
            }
            RoutingMethod::TopK { score: _, key: _, groups: _ }
            | RoutingMethod::TopKThenScore { score: _ }
            | RoutingMethod::Sparsemixer { router_jitter_noise: _ } => {}
        }
        let operation = Operation::TopkRouting(TopkRouting {
            num_experts: *num_experts,
            selectable: self.spec.selectable(),
            router_outputs: outputs,
            top_k,
            logits: precision.rounded(precision.router_gemm),
            transform,
            method: method.clone(),
            renormalize: *renormalize,
            per_expert_scale: *per_expert_scale,
            weight_scale: if *apply_routed_scale_to_output { 1.0 } else { *routed_scaling_factor },
            zero_experts_skip: match zero_experts {
                Some(ZeroExperts { count: _, kind: ZeroExpertKind::Skip }) => true,
                Some(ZeroExperts { count: _, kind: ZeroExpertKind::Identity }) | None => false,
            },
            nan_policy: *nan_policy,
            weights: precision.rounded(precision.routing_weights),
        });
        let limit = self.facts.max_workgroups as usize;
        let grid = Grid { x: Extent::Fixed(1), y: Extent::PerToken { items: 1, per: 1, limit } };
        let step = self.step("topk_routing", part, operation, grid, &buffers)?;
        self.drafts.push(Draft::Step(step));
        let all = Matrices::Groups;
        let load = Counted::Load(*num_experts);
        self.diagnose(part, load, [top_k, 0], all, LOAD_SLOT, &[("topk_ids", topk_ids)])?;
        self.diagnose(part, Counted::NonFinite, [1, outputs], all, 0, &[("rows", logits)])?;
        let buffers = vec![("topk_ids", topk_ids), ("topk_weights", topk_weights)];
        Ok(RoutedBuffers { row_slots: topk_ids, buffers, shared_weights })
    }

    /// The slot of each row, where it is not its expert's id: experts that are elsewhere, or rows that enter by slot.
    pub(super) fn assign(&mut self, routed: RoutedBuffers) -> Result<RoutedBuffers> {
        let RoutedBuffers { row_slots: topk_ids, mut buffers, shared_weights } = routed;
        let num_experts = self.spec.num_experts;
        let slots = match &self.spec.placement {
            Placement::All => {
                buffers.push(("row_slots", topk_ids));
                return Ok(RoutedBuffers { row_slots: topk_ids, buffers, shared_weights });
            }
            Placement::Range { first, count: _ } => ExpertSlots::Range { first: *first },
            Placement::Map { num_slots: _, replicas, slots } => {
                buffers.push(("expert_slots", self.table("expert_slots", Table::ExpertSlots, slots.len())));
                ExpertSlots::Table { replicas: *replicas }
            }
        };
        let selectable = self.spec.selectable();
        let by = AssignBy::Expert { num_experts, selectable, slots };
        let row_slots = self.assign_rows("experts.assign", self.spec.num_slots(), by, &mut buffers)?;
        buffers.push(("row_slots", row_slots));
        match slots {
            ExpertSlots::Range { first: _ } => {}
            ExpertSlots::Table { replicas: _ } => {
                let misses = self.buffer(EXPERT_MISSES, Contents::Scratch, 4 * num_experts);
                let operation = Diagnose {
                    counted: Counted::Misses(num_experts),
                    rows_per_token: self.spec.top_k,
                    cols: 0,
                    matrices: Matrices::Groups,
                    slot: 0,
                    model: FloatType::F32,
                };
                self.count(Part::Experts, EXPERT_MISSES, operation, misses, &buffers)?;
            }
        }
        Ok(RoutedBuffers { row_slots, buffers, shared_weights })
    }

    /// The slots of rows that enter by slot.
    pub(super) fn batched(&mut self, capacity: usize) -> Result<RoutedBuffers> {
        let num_slots = self.spec.num_slots();
        let mut buffers = vec![("counts", self.buffer("counts", Contents::Counts, 4 * num_slots))];
        match self.spec.routing.weight_position {
            WeightPosition::Output => {}
            WeightPosition::Input | WeightPosition::BeforeDown => {
                buffers.push(("topk_weights", self.token_buffer("row_weights", Contents::RowWeights, 4)));
            }
        }
        let by = AssignBy::Batched { capacity };
        let row_slots = self.assign_rows("experts.assign", num_slots, by, &mut buffers)?;
        let load = Counted::Load(num_slots);
        self.diagnose(Part::Experts, load, [1, 0], Matrices::Groups, LOAD_SLOT, &[("topk_ids", row_slots)])?;
        buffers.push(("row_slots", row_slots));
        Ok(RoutedBuffers { row_slots, buffers, shared_weights: None })
    }

    /// A step that says which matrix a row meets.
    pub(super) fn assign_rows(
        &mut self,
        name: &'static str,
        num_slots: usize,
        by: AssignBy,
        buffers: &mut Vec<(&'static str, usize)>,
    ) -> Result<usize> {
        let rows_per_token = self.spec.rows_per_token();
        let assigned = self.scratch(name, rows_per_token);
        buffers.push(("slots_out", assigned));
        let extent = Extent::PerToken { items: rows_per_token, per: 64, limit: 8192 };
        let grid = Grid { x: extent, y: Extent::Fixed(1) };
        let operation = Operation::Assign(Assign { rows_per_token, num_slots, by });
        let step = self.step(name, Part::Experts, operation, grid, buffers)?;
        buffers.retain(|(name, _)| *name != "slots_out");
        self.drafts.push(Draft::Step(step));
        Ok(assigned)
    }

    /// The layers of a router with state, to its logits.
    fn router_mlp(
        &mut self,
        hidden_states: Rows,
        state_size: usize,
        eps: f32,
        previous_state: bool,
        format: WeightFormat,
    ) -> Result<usize> {
        let part = Part::Routing;
        let f32_rows = |buffer| Rows::floats(buffer, FloatType::F32);
        let (outputs, state) = (self.spec.router_outputs(), 4 * state_size);
        let states = self.token_buffer("router_states", Contents::RouterStates, state);
        let (epilogue, others) = match previous_state {
            true => {
                let previous = self.token_buffer("previous_router_states", Contents::PreviousRouterStates, state);
                let scale = self.table("router_states_scale", Table::RouterStatesScale, state_size);
                (Epilogue::AddState, vec![("previous_router_states", previous), ("router_states_scale", scale)])
            }
            false => (Epilogue::Sums, vec![]),
        };
        let shape = [state_size, self.spec.hidden_size];
        self.project("router.down", part, hidden_states, shape, format, true, epilogue, states, others)?;
        let weight = self.table("router_norm", Table::RouterNorm, state_size);
        let normed = self.scratch("router_normed", state_size);
        let norm = Norm {
            rows_per_token: 1,
            cols: state_size,
            input: FloatType::F32,
            eps,
            scale: NormScale::After,
            factor: 1.0,
        };
        self.norm("router_norm", part, norm, states, weight, normed)?;
        let (inner, square) = (self.scratch("router_inner", state_size), [state_size, state_size]);
        let gelu = Epilogue::GeluErf;
        self.project("router.fc1", part, f32_rows(normed), square, format, true, gelu, inner, vec![])?;
        // The second layer writes over what the first has read.
        self.project("router.fc2", part, f32_rows(inner), square, format, true, gelu, normed, vec![])?;
        let logits = self.scratch("logits", outputs);
        let shape = [outputs, state_size];
        self.project("router.out", part, f32_rows(normed), shape, format, false, Epilogue::Sums, logits, vec![])?;
        Ok(logits)
    }
}
