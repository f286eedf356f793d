// x waits in workgroup memory, in stretches. [quad of a vector][vector]: neighbouring invocations read neighbours.
const STAGED: bool = true;
const INPUT_FACTOR: f32 = 1.0;
const STAGE_VECS: u32 = STAGE_QUADS / QUADS;

var<workgroup> stage: array<vec4<f32>, STAGE_QUADS>;

struct Entering {
    staged: u32,
}

fn input_quad(input: u32, col: u32) -> vec4<f32> {
    if INPUT_STRIDE % 4u == 0u && col < COLS {
        return input_four(input + col);
    }
    var values = vec4<f32>();
    if col < COLS {
        values.x = input_value(input + col);
    }
    if col + 1u < COLS {
        values.y = input_value(input + col + 1u);
    }
    if col + 2u < COLS {
        values.z = input_value(input + col + 2u);
    }
    if col + 3u < COLS {
        values.w = input_value(input + col + 3u);
    }
    return values;
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
