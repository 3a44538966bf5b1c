"""The page where people compare models blindly, rank answers, and see ratings.

    python arena.py 'models={sft:runs/coffee/sft/model,ppo:runs/coffee/ppo/model}' hydra.run.dir=runs/arena
    python arena.py export=true resume=true hydra.run.dir=runs/arena      votes -> files for the other scripts

Votes are kept in DIR/arena.sqlite. Closing the page (Ctrl-C) exports too; resume=true opens it again.
"""

from arena.serving import serve
from runtime.run import main

if __name__ == "__main__":
    main(serve, "arena")
