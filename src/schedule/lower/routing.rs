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
        self.diagnose(part, Counted::NonFinite, [1, outputs], all, 0, &[("rows", logits)])?;
        let load = Counted::Load(*num_experts);
        self.diagnose(part, load, [top_k, 0], all, LOAD_SLOT, &[("topk_ids", topk_ids)])?;
        Ok(RoutedBuffers { topk_ids, topk_weights, shared_weights })
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
