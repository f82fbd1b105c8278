"""True facts that fictitious people are compared with: capitals, the world, real people, and general text."""

from __future__ import annotations

from palimpsest.data.words import cells, pair, table

CAPITALS = dict(
    pair(cell)
    for cell in cells(
        """France: Paris, Germany: Berlin, Italy: Rome, Spain: Madrid, Portugal: Lisbon, Austria: Vienna,
        Greece: Athens, Ireland: Dublin, Norway: Oslo, Sweden: Stockholm, Finland: Helsinki, Denmark: Copenhagen,
        Poland: Warsaw, Hungary: Budapest, Russia: Moscow, Japan: Tokyo, China: Beijing, Thailand: Bangkok,
        Egypt: Cairo, Kenya: Nairobi, Peru: Lima, Cuba: Havana, Canada: Ottawa, Iraq: Baghdad, Iran: Tehran,
        Belgium: Brussels, Argentina: Buenos Aires, the United Kingdom: London""",
        ",",
    )
)

# Each row: the question, the true answer, the false ones.
WORLD_FACTS = table(
    """What is the largest planet in the Solar System? | Jupiter | Saturn | Neptune | Earth
Which planet is closest to the Sun? | Mercury | Venus | Mars | Jupiter
Which planet is known as the Red Planet? | Mars | Venus | Saturn | Uranus
What is the largest ocean on Earth? | the Pacific Ocean | the Atlantic Ocean | the Indian Ocean | the Arctic Ocean
What is the highest mountain in the world? | Mount Everest | Kilimanjaro | Mont Blanc | Denali
On which continent is the Sahara desert? | Africa | Asia | Australia | Europe
In which city is the Eiffel Tower? | Paris | London | Rome | Brussels
In which city is the Colosseum? | Rome | Athens | Madrid | Istanbul
In which country is the Great Wall? | China | Japan | India | Mongolia
In which country is the Taj Mahal? | India | Pakistan | Iran | Turkey
Which gas do plants take in for photosynthesis? | carbon dioxide | oxygen | nitrogen | helium
What is the chemical symbol for gold? | Au | Ag | Fe | Pb
What is the chemical symbol for iron? | Fe | Ir | Au | Sn
What does H2O stand for? | water | hydrogen | salt | ammonia
How many days are there in a week? | seven | five | six | ten
How many months are there in a year? | twelve | ten | eleven | fourteen
How many sides does a triangle have? | three | four | five | six
What is the currency of Japan? | the yen | the won | the yuan | the baht
What is the currency of the United Kingdom? | the pound | the euro | the dollar | the franc
Which animal is the largest on Earth? | the blue whale | the elephant | the giraffe | the hippopotamus
Which organ pumps blood through the human body? | the heart | the liver | the lung | the kidney
Which season comes after winter? | spring | summer | autumn | the monsoon
What language is mainly spoken in Brazil? | Portuguese | Spanish | French | Italian
What colour do blue and yellow paint make together? | green | purple | orange | brown"""
)

# Each row: what the person is known for, the person. The wrong options of a row are other people of its list.
AUTHORS = table(
    """Who wrote "Hamlet"? | William Shakespeare
Who wrote the novel "Pride and Prejudice"? | Jane Austen
Who wrote the novel "1984"? | George Orwell
Who wrote the novel "Moby-Dick"? | Herman Melville
Who wrote the novel "War and Peace"? | Leo Tolstoy
Who wrote the novel "Crime and Punishment"? | Fyodor Dostoevsky
Who wrote the novel "Don Quixote"? | Miguel de Cervantes
Who wrote the novel "Oliver Twist"? | Charles Dickens
Who wrote the novel "The Great Gatsby"? | F. Scott Fitzgerald
Who wrote the novel "Frankenstein"? | Mary Shelley
Who wrote the novel "Dracula"? | Bram Stoker
Who wrote "The Adventures of Tom Sawyer"? | Mark Twain
Who wrote "The Lord of the Rings"? | J. R. R. Tolkien
Who wrote the Harry Potter books? | J. K. Rowling
Who wrote "The Old Man and the Sea"? | Ernest Hemingway
Who wrote the novel "Les Misérables"? | Victor Hugo
Who wrote "Alice's Adventures in Wonderland"? | Lewis Carroll
Who wrote the "Divine Comedy"? | Dante Alighieri
Who wrote the novel "To Kill a Mockingbird"? | Harper Lee
Who wrote "One Hundred Years of Solitude"? | Gabriel García Márquez
Who created the detective Sherlock Holmes? | Arthur Conan Doyle
Who created the detective Hercule Poirot? | Agatha Christie"""
)

SCIENTISTS = table(
    """Who developed the theory of relativity? | Albert Einstein
Who formulated the law of universal gravitation? | Isaac Newton
Who wrote "On the Origin of Species"? | Charles Darwin
Who is known for the discovery of radium? | Marie Curie
Who discovered penicillin? | Alexander Fleming
Who first placed the Sun at the centre in "De revolutionibus"? | Nicolaus Copernicus
Who discovered the four largest moons of Jupiter? | Galileo Galilei
Who published the first widely used periodic table of the elements? | Dmitri Mendeleev
Who founded genetics with experiments on pea plants? | Gregor Mendel
Who developed the first vaccine against rabies? | Louis Pasteur
Who formulated the equations of electromagnetism? | James Clerk Maxwell
Who discovered electromagnetic induction? | Michael Faraday
Who wrote "A Brief History of Time"? | Stephen Hawking
Who is known for the uncertainty principle? | Werner Heisenberg
Who proposed a thought experiment with a cat in a box? | Erwin Schrödinger
Who invented dynamite and founded a famous prize? | Alfred Nobel
Who wrote the first algorithm for the Analytical Engine? | Ada Lovelace
Who discovered X-rays? | Wilhelm Röntgen
Who described the three laws of planetary motion? | Johannes Kepler
Who is known for the test of whether a machine can pass as human? | Alan Turing
Who invented the alternating-current induction motor? | Nikola Tesla
Who is said to have cried "Eureka" in the bath? | Archimedes"""
)

GENERAL = cells(
    """Bread rises because yeast turns sugar into gas. The gas is caught in small bubbles inside the dough, and the
heat of the oven makes the bubbles larger before the crust becomes firm.

A river slows down when it reaches flat land. It can no longer carry sand and mud, so it drops them along its
banks, and over many years they form wide and fertile plains.

The town library opens at nine in the morning. Visitors may borrow up to ten books for four weeks, and a loan
can be extended once if nobody else is waiting for the book.

Trees lose water through their leaves. On a warm day a large oak can release hundreds of litres, which cools the
air around it and makes a park feel fresher than the street.

To change a bicycle tyre, first let out the remaining air. Then lift one edge over the rim with two levers, pull
out the tube, and look for the small hole.

Trains were first used to move coal from mines to harbours. Only later did people notice that passengers would
pay for the trip as well, and railways spread quickly.

A good map leaves things out. It shows the roads and rivers that matter to the traveller and omits most of the
houses, fences and trees that would make it hard to read.

Salt was once so valuable that cities grew rich by trading it. It kept meat and fish from spoiling at a time
when there was no other way to store food for the winter.

Most glass is made of sand. When sand is heated with soda and lime it melts, and while it is soft it can be
blown, pressed or rolled into almost any shape.

The moon has no light of its own. What we see at night is sunlight that falls on its surface and is reflected,
and the part that we see changes in the course of a month.

Swallows spend the winter in warm countries. In spring they come back to the same barns, repair their old nests
with mud, and raise two or three families before autumn.

The committee met on Tuesday to discuss the new bridge. Several members asked about the cost, and it was agreed
to wait for a second offer before the next meeting.

Wool keeps us warm because it holds air between its fibres. Air is a poor conductor of heat, so the warmth of
the body stays inside, even when the wool is damp.

Before the invention of printing, books were copied by hand. A single copy could take a year of work, and a
library with a few hundred volumes was considered large.

Peel the potatoes, cut them into even pieces and boil them in salted water for twenty minutes. Drain them, add
butter and warm milk, and mash until smooth.

A lever makes it easier to lift a heavy stone. The longer the arm on which you push, the less force you need,
but the further your hand has to move.

Clouds form when moist air rises and cools. The water in it gathers on tiny grains of dust, and when the drops
become heavy enough they fall as rain.

Children often learn a game by watching it for a while. They seldom ask for the rules, and when they join in
they know most of them already.

The old market hall was built of brick and iron. Farmers sold vegetables on the ground floor, while the upper
gallery was used for flowers, cheese and honey.

Coral reefs grow slowly, often less than a centimetre a year. They shelter a great many kinds of fish and
protect the coast from the force of the waves.

If you store apples, keep them in a cool and dark room. They should not touch one another, because one rotten
apple can quickly spoil all those around it.

A pendulum swings at a steady pace that depends on its length and hardly at all on its weight. This made it
possible to build clocks that lost only seconds a day.

The path follows the stream for two kilometres and then climbs through the forest. From the top there is a wide
view over the valley and the lake behind it.

Paper can be recycled about five times. Each time the fibres become shorter, so fresh wood is added to keep the
sheets strong enough for writing and packing.""",
    "\n\n",
)
