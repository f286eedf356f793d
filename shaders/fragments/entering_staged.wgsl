// x waits in workgroup memory, in stretches. [quad of a vector][vector]: neighbouring invocations read neighbours.
const STAGED: bool = true;
const INPUT_FACTOR: f32 = 1.0;
const STAGE_VECS: u32 = STAGE_QUADS / QUADS;

var<workgroup> stage: array<vec4<f32>, STAGE_QUADS>;

struct Entering {
    staged: u32,
}

// Vectors from `begin` on, `count` of them.
fn stage_input(row: u32, index: u32, begin: u32, count: u32) {
    let input = row / INPUT_DIVISOR * INPUT_STRIDE;
    for (var quad = index; quad < count * QUADS; quad += WORKGROUP_SIZE) {
        let values = input_quad(input, begin * WEIGHTS_PER_VEC + quad * 4u);
        stage[quad % QUADS * STAGE_VECS + quad / QUADS] = weigh_input_quad(row, values);
    }
}

// What meets vector `begin + vec`.
fn entering_at(row: u32, begin: u32, vec: u32) -> Entering {
    return Entering(vec);
}

fn entering_quad(entering: Entering, quad: u32) -> vec4<f32> {
    return stage[quad * STAGE_VECS + entering.staged];
}

fn entering_nans(entering: Entering) -> u32 {
    return 0u;
}
