"""Writes the chat data of `peft demo`: small questions, each answered in the same three lines.

    python examples/demo_data.py > src/peft/cli/demo.jsonl

What is to be learnt is the form (In short, Why, Check), so the facts are ones that a small model half knows. The
questions that the demo asks are not among them.
"""

import json
import random

CAPITALS = """
Italy Rome Europe, Spain Madrid Europe, Germany Berlin Europe, Austria Vienna Europe, Poland Warsaw Europe, Greece
Athens Europe, Norway Oslo Europe, Sweden Stockholm Europe, Finland Helsinki Europe, Denmark Copenhagen Europe,
Ireland Dublin Europe, Hungary Budapest Europe, Belgium Brussels Europe, Iceland Reykjavik Europe, Romania Bucharest
Europe, Bulgaria Sofia Europe, Croatia Zagreb Europe, Serbia Belgrade Europe, Ukraine Kyiv Europe, Japan Tokyo Asia,
China Beijing Asia, India Delhi Asia, Thailand Bangkok Asia, Vietnam Hanoi Asia, Nepal Kathmandu Asia, Iran Tehran
Asia, Iraq Baghdad Asia, Indonesia Jakarta Asia, Mongolia Ulaanbaatar Asia, Turkey Ankara Asia, Egypt Cairo Africa,
Kenya Nairobi Africa, Ghana Accra Africa, Morocco Rabat Africa, Senegal Dakar Africa, Tunisia Tunis Africa, Algeria
Algiers Africa, Uganda Kampala Africa, Ethiopia Addis-Ababa Africa, Rwanda Kigali Africa, Canada Ottawa America, Cuba
Havana America, Peru Lima America, Chile Santiago America, Brazil Brasilia America, Colombia Bogota America, Ecuador
Quito America, Venezuela Caracas America, Uruguay Montevideo America, Australia Canberra Oceania
"""
ELEMENTS = """
hydrogen H 1, helium He 2, lithium Li 3, carbon C 6, nitrogen N 7, oxygen O 8, fluorine F 9, neon Ne 10, sodium Na 11,
magnesium Mg 12, aluminium Al 13, silicon Si 14, phosphorus P 15, sulfur S 16, chlorine Cl 17, argon Ar 18, potassium
K 19, calcium Ca 20, titanium Ti 22, chromium Cr 24, manganese Mn 25, iron Fe 26, cobalt Co 27, nickel Ni 28, copper
Cu 29, zinc Zn 30, bromine Br 35, silver Ag 47, tin Sn 50, iodine I 53, tungsten W 74, platinum Pt 78, gold Au 79,
mercury Hg 80, lead Pb 82, uranium U 92
"""
ANIMALS = """
dog mammal feeds its young with milk, cat mammal feeds its young with milk, whale mammal breathes air and nurses its
calves, bat mammal has fur and nurses its young, horse mammal feeds its foals with milk, elephant mammal feeds its
calves with milk, eagle bird has feathers and lays eggs, owl bird has feathers and lays eggs, penguin bird has
feathers although it cannot fly, ostrich bird has feathers and lays the largest eggs, sparrow bird has feathers and a
beak, salmon fish breathes with gills, shark fish breathes with gills, tuna fish breathes with gills, frog amphibian
starts its life in water with gills, newt amphibian lives in water and on land, snake reptile has scales and needs the
sun to warm up, lizard reptile has scales and needs the sun to warm up, turtle reptile has scales and lays eggs on
land, crocodile reptile has scales and lays eggs on land, ant insect has six legs, bee insect has six legs and two
pairs of wings, butterfly insect has six legs and four wings, beetle insect has six legs and hard wing cases
"""
OPPOSITES = """
hot cold, big small, fast slow, early late, full empty, open closed, light heavy, wet dry, hard soft, high low, long
short, young old, rich poor, strong weak, loud quiet, near far, clean dirty, easy difficult, wide narrow, thick thin,
deep shallow, sharp blunt, smooth rough, brave timid, first last, always never, buy sell, push pull, win lose, arrive
leave
"""


def rows(table: str, parts: int) -> list[list[str]]:
    return [entry.split(maxsplit=parts - 1) for entry in " ".join(table.split()).split(", ")]


def article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def examples() -> list[tuple[str, str, str, str]]:
    """(question, answer in short, why, how to check it)"""
    draw = random.Random(0)
    found = []
    for country, capital, continent in rows(CAPITALS, 3):
        capital = capital.replace("-", " ")
        ask = draw.choice(["What is the capital of {}?", "Name the capital of {}.", "Which city is the capital of {}?"])
        why = f"{capital} is the seat of the government of {country}."
        found.append((ask.format(country), capital, why, f"look at a map of {continent}."))
    for name, symbol, number in rows(ELEMENTS, 3):
        ask = draw.choice(["What is the chemical symbol of {}?", "Which symbol stands for {} in chemistry?"])
        why = f"{name} is element number {number}, and {symbol} is its sign."
        found.append((ask.format(name), symbol, why, f"find box {number} of the periodic table."))
        found.append((f"What is the atomic number of {name}?", number, f"an atom of {name} has {number} protons.",
                      f"find {symbol} in the periodic table."))  # fmt: skip
    for animal, kind, why in rows(ANIMALS, 3):
        question = draw.choice(["What kind of animal is {}?", "To which group of animals does {} belong?"])
        found.append((question.format(article(animal)), article(kind), f"{article(animal)} {why}.",
                      f"compare it with another {kind}."))  # fmt: skip
    for one, other in rows(OPPOSITES, 2):
        ask = draw.choice(["What is the opposite of {}?", "Tell me a word that means the opposite of {}."])
        why, check = f"what is {one} is not {other}.", "put both words into a sentence."
        found.append((ask.format(f'"{one}"'), other, why, check))
    for _ in range(40):
        a, b = draw.randint(2, 40), draw.randint(2, 40)
        found.append((f"What is {a} + {b}?", str(a + b), f"{a} and {b} make {a + b}.", f"{a + b} - {b} is {a} again."))
    for _ in range(30):
        a, b = draw.randint(2, 9), draw.randint(2, 9)
        why = f"{a} rows of {b} are {a * b}."
        found.append((f"How much is {a} times {b}?", str(a * b), why, f"{a * b} divided by {b} is {a} again."))
    draw.shuffle(found)
    return found


if __name__ == "__main__":
    for question, short, why, check in examples():
        answer = f"In short: {short}\nWhy: {why}\nCheck: {check}"
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        print(json.dumps({"messages": messages}))
